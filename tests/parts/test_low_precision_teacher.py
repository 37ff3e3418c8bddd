"""Under autocast a teacher computes from weights that are converted once: the same numbers, never old ones."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.parts.momentum_teacher import MomentumTeacher, move_where

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def encoder(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    size = {"img_size": 32} if "vit" in name else {}
    return timm.create_model(name, num_classes=0, **size).to(memory_format=torch.channels_last)


def converting_each_time(
    teacher: MomentumTeacher, images: Tensor = IMAGES, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """What the teacher's module computes without the converted weights; its statistics do not move."""
    before = copy.deepcopy(teacher.module.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out = teacher.module(images)
    teacher.module.load_state_dict(before)
    return out


def computed(teacher: MomentumTeacher, images: Tensor = IMAGES, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return teacher(images)


class Conversions(TorchDispatchMode):
    """Counts what is converted: tensor by tensor, and in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_features_have_the_bits_of_weights_that_are_converted_each_time(name: str) -> None:
    teacher, student = MomentumTeacher(encoder(name)), encoder(name, seed=1)
    names = list(teacher.state_dict())
    for _ in range(3):
        expected = converting_each_time(teacher)
        assert torch.equal(computed(teacher), expected)
        teacher.update(student, 0.9)
    assert list(teacher.state_dict()) == names
    assert all(param.dtype == torch.float32 and isinstance(param, nn.Parameter) for param in teacher.parameters())
    without = copy.deepcopy(teacher).eval()
    assert torch.equal(teacher.eval()(IMAGES), without.module(IMAGES))  # no autocast, no conversion


def test_weights_are_converted_once_an_update() -> None:
    teacher = MomentumTeacher(encoder("test_vit"))
    student, plain = encoder("test_vit", seed=1), copy.deepcopy(teacher)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Conversions() as each_time:
        plain.module(IMAGES)
    computed(teacher)
    with Conversions() as unchanged:
        computed(teacher)
    teacher.update(student, 0.9)
    with Conversions() as moved:
        computed(teacher)
    layers = [layer for layer in teacher.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    weights = sum(len(list(layer.parameters())) for layer in layers)
    assert each_time.operators["_to_copy"] - unchanged.operators["_to_copy"] == weights
    assert unchanged.operators["_foreach_copy_"] == 0
    assert moved.operators["_foreach_copy_"] == 1
    assert moved.operators["_to_copy"] == unchanged.operators["_to_copy"]


def load(teacher: MomentumTeacher) -> None:
    teacher.load_state_dict(MomentumTeacher(encoder("test_vit", seed=2)).state_dict())


def assign(teacher: MomentumTeacher) -> None:
    teacher.load_state_dict(MomentumTeacher(encoder("test_vit", seed=2)).state_dict(), assign=True)


def change_one(teacher: MomentumTeacher) -> None:
    with torch.no_grad():
        teacher.module.blocks[0].attn.qkv.weight[0, 0] += 1.0


def replace_one(teacher: MomentumTeacher) -> None:
    teacher.module.blocks[0].attn.qkv.bias = nn.Parameter(torch.ones(192), requires_grad=False)


def to_double_and_back(teacher: MomentumTeacher) -> None:
    teacher.double()
    assert computed(teacher, IMAGES.double()).dtype == torch.float64
    teacher.float()
    change_one(teacher)


def move_as_a_gpu(teacher: MomentumTeacher) -> None:
    student = encoder("test_vit", seed=1)
    move_where(torch.ones(()), [each.detach() for each in teacher.parameters()], list(student.parameters()), 0.5)


@pytest.mark.parametrize("change", [load, assign, change_one, replace_one, to_double_and_back, move_as_a_gpu])
def test_no_change_is_missed(change: Callable[[MomentumTeacher], None]) -> None:
    teacher = MomentumTeacher(encoder("test_vit")).eval()
    before = computed(teacher)
    change(teacher)
    after = computed(teacher)
    assert torch.equal(after, converting_each_time(teacher))
    assert not torch.equal(after, before)


def test_a_copy_converts_its_own_weights() -> None:
    teacher = MomentumTeacher(encoder("test_vit")).eval()
    computed(teacher)
    other = copy.deepcopy(teacher)
    change_one(other)
    assert torch.equal(computed(other), converting_each_time(other))
    assert not torch.equal(computed(other), computed(teacher))


def test_another_dtype_and_an_error_leave_the_weights() -> None:
    teacher = MomentumTeacher(encoder("test_vit")).eval()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(computed(teacher, dtype=dtype), converting_each_time(teacher, dtype=dtype))
    weights = list(teacher.parameters())
    with pytest.raises(RuntimeError):
        computed(teacher, torch.rand(1, 5, 32, 32))
    assert all(one is other for one, other in zip(teacher.parameters(), weights, strict=True))


def test_layers_that_do_more_with_their_weight_are_left_alone() -> None:
    torch.manual_seed(0)
    normed = weight_norm(nn.Linear(8, 8))
    teacher = MomentumTeacher(nn.Sequential(normed, nn.Linear(8, 4)))
    x = torch.randn(3, 8)
    assert torch.equal(computed(teacher, x), converting_each_time(teacher, x))
