"""BatchNorm on GPUs: groups of rows in one pass, against one pass a group; the GPU's code path on CPU tensors."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_operators  # noqa: F401
import numpy as np
import pytest
import timm
import torch
import triton
from conftest import small_recipe
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method
from sslkit.parts.backbone import recompute_activations
from sslkit.parts.batch_slices import encode_each, encode_in_slices, encode_together
from sslkit.parts.batchnorm import (
    DeviceBatchNorm,
    GroupStatistics,
    can_divide,
    chunk_kernels,
    device_norm,
    device_norms,
    normalisation,
    synchronise_batch_norm,
)
from sslkit.parts.schedules import Progress

GPU = torch.device("cuda")  # chooses the layers; no tensor is on it
ROWS, STEPS = 12, 3


class Convolutions(nn.Sequential):
    """Layers of every kind: with activation and dropout, without scale, without statistics, of rows."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__(
            nn.Conv2d(3, 5, 3, stride=2),
            BatchNormAct2d(5, momentum=momentum, drop_layer=nn.Identity),
            nn.Conv2d(5, 6, 3, stride=2),
            nn.BatchNorm2d(6, affine=False, momentum=momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, 1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Flatten(2),
            nn.BatchNorm1d(4, eps=1e-3, momentum=momentum),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.BatchNorm1d(4, momentum=0.35 if momentum else None),
        )


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: Any = Convolutions() if name == "convolutions" else None
    made = Convolutions(momentum=None) if name == "means of all batches" else made
    options = {"norm_layer": "batchnorm2d", "conv_mlp": True} if name == "test_convnext" else {}
    made = timm.create_model(name, num_classes=0, **options) if made is None else made
    model: nn.Module = made.double().to(memory_format=torch.channels_last).train()
    for param in model.parameters():
        if param.ndim == 1:  # a scale of 0 at the start would hide the layer
            nn.init.normal_(param, mean=1.0)
    return model


def on_gpu(model: nn.Module, *, synchronised: bool = False) -> nn.Module:
    """A copy with the layers of GPUs."""
    converted = synchronise_batch_norm(copy.deepcopy(model), GPU)
    for layer in device_norms([converted]):
        layer.synchronised = synchronised
    return converted


def views_of(step: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    views = [2 + torch.randn(ROWS, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [view.to(memory_format=torch.channels_last).requires_grad_() for view in views]


def encode(model: nn.Module, views: list[Tensor], slices: int, groups: int, *, together: bool) -> list[Tensor]:
    """Features in ``slices`` passes of ``groups`` groups, and gradients of an arbitrary loss."""

    def encoder(part: Any) -> list[Tensor]:
        return encode_together(part, model) if together else encode_each(part, model)

    features = encode_in_slices(encoder, views, slices, statistics=GroupStatistics([model], slices, groups=groups))
    sum((each.sin() * (index + 1)).sum() for index, each in enumerate(features)).backward()
    return features


def assert_alike(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    assert dict(model.state_dict()).keys() == dict(other.state_dict()).keys()
    pairs = {name: (value, other.state_dict()[name]) for name, value in model.state_dict().items()}
    others = dict(other.named_parameters())
    grads = {name: (param.grad, others[name].grad) for name, param in model.named_parameters()}
    largest = max((float(grad.abs().max()) for grad, _ in grads.values() if grad is not None), default=0.0)
    pairs |= {f"gradient of {name}": pair for name, pair in grads.items()}
    for name, (found, expected) in pairs.items():
        atol = tolerance * (max(largest, 1.0) if name.startswith("gradient") else 1.0)  # some are 0 but for rounding
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = [
    ("convolutions", 3, 2, False),
    ("convolutions", 6, 1, False),
    ("convolutions", 2, 3, True),
    ("means of all batches", 3, 2, False),
    ("test_resnet", 4, 2, False),
    pytest.param("test_efficientnet", 3, 1, False, marks=pytest.mark.full),
    pytest.param("test_byobnet", 2, 2, True, marks=pytest.mark.full),
    pytest.param("test_convnext", 2, 1, False, marks=pytest.mark.full),
    ("test_vit", 2, 2, False),
]


@pytest.mark.parametrize("synchronised", [False, True], ids=["one view a pass", "all views in a pass"])
@pytest.mark.parametrize(("name", "groups", "views", "together"), CASES)
def test_one_pass_equals_a_pass_a_group(name: str, groups: int, views: int, together: bool, synchronised: bool) -> None:
    """Features, gradients of inputs and parameters, and running statistics after several steps.

    ``synchronised`` layers of one process are those of several: their views go through in one pass.
    """
    expected = backbone(name)
    found = on_gpu(expected, synchronised=synchronised)
    if name != "test_vit":
        assert can_divide(found)
        assert not can_divide(expected)
    for step in range(STEPS):
        inputs, others = views_of(step, views), views_of(step, views)
        wanted = encode(expected, inputs, groups, 1, together=together)
        features = encode(found, others, 1, groups, together=together)
        for got, want in zip([*features, *(v.grad for v in others)], [*wanted, *(v.grad for v in inputs)], strict=True):
            scale = float(want.detach().abs().max())
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12 * scale)
    assert_alike(found, expected, 1e-11)


def test_slices_of_several_groups() -> None:
    """Two slices of three groups are six groups."""
    expected, (found, count) = backbone("convolutions"), (on_gpu(backbone("convolutions")), 6)
    for step in range(STEPS):
        encode(expected, views_of(step, 2), count, 1, together=False)
        encode(found, views_of(step, 2), 2, count // 2, together=False)
    assert_alike(found, expected)


def test_recomputed_activations() -> None:
    """The backward pass normalises again by the same groups, each view apart."""
    plain, again = (on_gpu(backbone("test_resnet"), synchronised=True) for _ in range(2))
    recompute_activations(again, "test_resnet")
    for model in (plain, again):
        encode(model, views_of(0, 2), 1, 3, together=False)
    for (name, param), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, param.grad, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.full
def test_compiled_backbone() -> None:
    """No graph breaks, and the same numbers, with running statistics and counts."""
    plain, compiled = (on_gpu(backbone("convolutions"), synchronised=True) for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    for step in range(2):
        for model in (plain, compiled):
            encode(model, views_of(step, 2), 1, 3, together=False)
    assert_alike(compiled, plain)


@pytest.mark.parametrize("name", [pytest.param("moco_v1", marks=pytest.mark.full), "moco_v2", "end_to_end", "swav"])
def test_methods(name: str) -> None:
    """A method's loss, gradients and statistics, of student and teacher, in one pass and in a pass a group."""
    options: dict[str, Any] = {"bn_groups": 3}
    options |= {} if name == "swav" else {"symmetric": True}
    torch.manual_seed(0)
    expected: Method = build_method(small_recipe(name, "test_resnet", method=options)).double().train()
    found = copy.deepcopy(expected)
    found.synchronise_batch_norm(GPU)
    calls: list[int] = []
    found.backbone.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    for step in range(STEPS):
        views = [view.detach() for view in views_of(step, 4 if name == "swav" else 2)]
        order = np.random.default_rng(step).permutation(ROWS) if expected.shuffle_keys else None
        steps = [
            method(views, BatchInfo(torch.arange(ROWS)), Progress(0, 1), order, None) for method in (expected, found)
        ]
        for each in steps:
            each.loss.backward()
        torch.testing.assert_close(steps[1].loss, steps[0].loss, rtol=1e-11, atol=1e-12)
        for method in (expected, found):
            method.after_update(Progress(step + 1, 10))
    assert set(calls) == {4 * ROWS if name == "swav" else ROWS}
    assert_alike(found, expected, 1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("views", [1, 2])
def test_processes_share_their_statistics(views: int, momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same rows are one with each row twice; all views' statistics are gathered at once."""
    gathered: list[Tensor] = []

    def gather(values: Tensor, how: normalisation.Normalisation) -> Tensor:
        gathered.append(values)
        return torch.stack([values, values])

    monkeypatch.setattr(normalisation, "gather_statistics", gather)
    monkeypatch.setattr(normalisation, "sum_of_gradients", lambda sums, how: 2 * sums)
    monkeypatch.setattr(device_norm, "world_size", lambda: 2)
    expected = nn.BatchNorm2d(4, momentum=momentum).double()
    found = on_gpu(expected, synchronised=True)
    own = [torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(views)]
    twice = [torch.cat([rows, rows]).detach().requires_grad_() for rows in own]
    targets = [torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in range(views)]
    features = encode_each(own, found)
    wanted = encode_each(twice, expected)
    assert len(gathered) == (1 if momentum else views)
    for rows, both, feature, want, target in zip(own, twice, features, wanted, targets, strict=True):
        (feature * target).sum().backward(retain_graph=True)
        (want * torch.cat([target, target])).sum().backward(retain_graph=True)
        torch.testing.assert_close(feature, want[:3], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.grad, both.grad[:3], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.weight.grad, expected.weight.grad / 2, rtol=1e-11, atol=1e-11)
    for buffer, other in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12)


def test_low_precision() -> None:
    """bfloat16 inputs give bfloat16 outputs, near float32's, with float32 statistics."""
    norm = nn.BatchNorm2d(8).to(memory_format=torch.channels_last)
    rows = torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = DeviceBatchNorm(copy.deepcopy(norm))
        layer.start_pass(4)
        x = rows.detach().to(dtype, copy=True).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        assert (out.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, torch.float32)
        assert out.is_contiguous(memory_format=torch.channels_last)
        outputs.append((out.float(), layer.running_mean, layer.running_var))
    for low, full in zip(*reversed(outputs), strict=True):
        torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)


def test_evaluation_and_export_are_those_of_batch_norm() -> None:
    expected = backbone("convolutions")
    found = on_gpu(expected)
    for layer in device_norms([found]):
        layer.start_pass(4)
    rows = views_of(0, 1)[0]
    assert torch.equal(found.eval()(rows[:5]), expected.eval()(rows[:5]))
    fresh = Convolutions().double()
    fresh.load_state_dict(found.state_dict())


def test_counts_are_added_together() -> None:
    """Batches are counted after a pass, all layers at once; a second forward pass for gradients is not counted."""
    model = on_gpu(backbone("convolutions"))
    statistics = GroupStatistics([model], 1, groups=3)
    counters = [layer.num_batches_tracked for layer in device_norms([model]) if layer.track_running_stats]
    statistics.start_slice()
    model(views_of(0, 1)[0])
    assert [int(each) for each in counters] == [0, 0, 0, 0]
    statistics.end_slice()
    model(views_of(0, 1)[0])
    statistics.start_slice()
    statistics.end_slice()
    assert [int(each) for each in counters] == [1, 1, 1, 1]


def test_rows_that_cannot_be_divided() -> None:
    layer = DeviceBatchNorm(nn.BatchNorm1d(3))
    layer.start_pass(4)
    with pytest.raises(ValueError, match="10 rows cannot be divided into 4 equal groups"):
        layer(torch.zeros(10, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.zeros(4, 3))


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def kernels() -> dict[str, float]:
    """What Triton's interpreter computes, and the sizes of the kernels compiled for GPUs."""
    paths = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, str(HERE / "interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1].removeprefix("RESULT "))


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("case", ["rows", "images", "splits", "views"])
def test_the_kernels_compute_what_the_operators_mean(
    kernels: dict[str, float], case: str, dtype: str, tolerance: float
) -> None:
    assert kernels[f"{case} {dtype}"] < tolerance


@pytest.mark.full
def test_a_value_that_is_not_finite_stays_visible(kernels: dict[str, float]) -> None:
    assert kernels["nan in"] == kernels["nan out"] == 1.0


INTS = ("i32",) * 4
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, float]]] = {
    "_moments_kernel": (("*{x}", "*fp32"), INTS, {}),
    "_normalise_kernel": (("*{x}", "*fp32", "*fp32", "*fp32", "*{x}"), INTS, {"eps": 1e-5}),
    "_gradient_sums_kernel": (("*{x}", "*{x}", "*fp32", "*fp32"), (*INTS, "i32"), {"eps": 1e-5}),
    "_gradient_kernel": (("*{x}", "*{x}", "*fp32", "*fp32", "*fp32", "*{x}"), INTS, {"eps": 1e-5}),
    "_combine_kernel": (("*fp32",) * 4, (*INTS, "i32"), {"views": 2, "momentum": 0.1, "padded": 8}),
}


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_gpus(
    name: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles to machine code without a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers, sizes, constants = KERNELS[name]
    constants = {**constants, "tile_rows": 64, "tile_channels": 64}
    kernel = getattr(chunk_kernels, name)
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {"tensors": tuple(each.format(x=dtype) for each in pointers), "sizes": sizes}
    given = {each: value for each, value in constants.items() if each in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert compiled.metadata.shared <= 48 * 1024
    assert compiled.asm["cubin"]
