"""Recipe switches that make a step smaller or faster and must not change its numbers."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import cli_error, small_recipe
from torch import nn

from sslkit.engine.run import build_method, compile_backbones
from sslkit.engine.step import GlobalBatch, whole_batch_step
from sslkit.methods import Method

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
    batch = GlobalBatch(views, torch.arange(BATCH), None, lambda view: view)
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


PEAK = """
import resource, torch
from conftest import small_recipe
from sslkit.engine.run import build_method
torch.manual_seed(0)
recipe = small_recipe("moco_v3", "test_vit", views={{"size": 96}},
    train={{"batch_size": 256, "activation_checkpointing": {switch}}})
method = build_method(recipe)
views = [torch.randn(256, 3, 96, 96) for _ in range(2)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
method(views, torch.arange(256)).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_recomputing_takes_less_memory() -> None:
    """The peak of a step's memory, each in a process of its own."""
    peaks = []
    for switch in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", PEAK.format(switch=switch)], capture_output=True, text=True, check=True, cwd="tests"
        )
        peaks.append(int(run.stdout))
    assert peaks[1] < 0.75 * peaks[0]


def test_a_model_without_the_switch_is_refused(tmp_path: object) -> None:
    words = ["pretrain", "--method", "moco_v2", "--backbone", "vgg11", "--data", "builtin:fashion_mnist"]
    asked = ["--set", "train.activation_checkpointing=true", "--set", "views.size=64", "--output", f"{tmp_path}/run"]
    assert "[train] activation_checkpointing: timm has no such switch for 'vgg11'" in cli_error([*words, *asked])


def test_compiling_calls_the_compiler_on_both_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    method = build("test_vit")
    compile_backbones(method)
    assert compiled == [method.backbone, method.teacher_backbone.module]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_compiled_backbones_give_the_same_numbers(model: str) -> None:
    plain = build(model)
    compiled = copy.deepcopy(plain)
    compile_backbones(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert step(compiled) == pytest.approx(step(plain), rel=1e-9)
    assert_same(compiled, plain, 1e-6)
