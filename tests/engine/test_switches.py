"""Recipe switches that make a step smaller or faster and must not change its numbers."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import cli_error, small_recipe
from torch import nn

from sslkit.data.sources.image_source import open_source
from sslkit.engine.gradient_cache import GlobalBatch, whole_batch_step
from sslkit.engine.runtime.compilation import compile_encoders
from sslkit.engine.setup import build_method, set_up_training
from sslkit.methods import BatchInfo, Method
from sslkit.parts.schedules import Progress

BATCH = 8


def build(model: str, *, recompute: bool = False) -> Method:
    train = {"batch_size": BATCH, "activation_checkpointing": recompute}
    recipe = small_recipe("moco_v3", model, train=train, backbone={"args": {"drop_path_rate": 0.2}})
    torch.manual_seed(0)
    return build_method(recipe).double()


def step(method: Method) -> float:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    torch.manual_seed(2)
    batch = GlobalBatch(views, BatchInfo(torch.arange(BATCH)), Progress(0, 1), None, lambda view: view)
    return whole_batch_step(Accelerator(cpu=True), method, batch).loss.item()


def assert_same(one: Method, other: Method, tolerance: float) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance, msg=name)
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_recomputed_activations_change_no_number(model: str) -> None:
    """Nor do they count a batch twice in the running statistics."""
    plain, recomputing = build(model), build(model, recompute=True)
    assert step(recomputing) == pytest.approx(step(plain), rel=1e-12)
    assert_same(recomputing, plain, 1e-10)


def test_recomputing_is_only_the_students() -> None:
    method = build("test_vit", recompute=True)
    assert method.backbone.grad_checkpointing
    assert not method.teacher_backbone.module.grad_checkpointing


def kept_bytes(method: Method) -> int:
    """Bytes of all that a forward pass keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = [torch.randn(32, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method(views, BatchInfo(torch.arange(32)), Progress(0, 1)).loss
    assert loss.requires_grad
    return sum(storages.values())


def test_recomputing_keeps_fewer_activations() -> None:
    parameters = sum(param.nbytes for param in build("test_vit").parameters())
    plain, recomputing = (kept_bytes(build("test_vit", recompute=switch)) - parameters for switch in (False, True))
    assert recomputing < 0.6 * plain


def test_a_model_without_the_switch_is_refused(tmp_path: object) -> None:
    words = ["pretrain", "--method", "moco_v2", "--backbone", "vgg11", "--data", "builtin:fashion_mnist"]
    asked = ["--set", "train.activation_checkpointing=true", "--set", "views.size=64", "--output", f"{tmp_path}/run"]
    assert "[train] activation_checkpointing: timm has no such switch for 'vgg11'" in cli_error([*words, *asked])


def test_compiling_calls_the_compiler_on_both_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    method = build("test_vit")
    recipe = small_recipe("moco_v3", "test_vit", train={"compile": True})
    set_up_training(recipe, open_source(recipe.data), Accelerator(cpu=True), method=method)
    assert compiled == [method.backbone, method.teacher_backbone.module]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "how"), [("test_vit", True), ("test_resnet", True), ("test_vit", "blocks")])
def test_compiled_backbones_give_the_same_numbers(model: str, how: bool | str) -> None:
    plain = build(model)
    compiled = copy.deepcopy(plain)
    compile_encoders(compiled.backbones(), how, model)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert step(compiled) == pytest.approx(step(plain), rel=1e-9)
    assert_same(compiled, plain, 1e-6)
