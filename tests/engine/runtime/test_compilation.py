"""`[train] compile`: per block or whole, against eager; the warm-up. A quick backend stands in for inductor."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import small_recipe
from torch import Tensor, nn

from sslkit.data.sources.image_source import open_source
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.runtime.compilation import WarmUp, blocks_of, compile_encoders
from sslkit.engine.setup import build_method, set_up_training
from sslkit.errors import UserError
from sslkit.methods import BatchInfo, Method
from sslkit.parts.schedules import Progress

BATCH = 8


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace and differentiate as always, and run the graphs without generating code for them."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def build(model: str, *, recompute: bool = False) -> Method:
    train = {"batch_size": BATCH, "activation_checkpointing": recompute}
    torch.manual_seed(0)
    return build_method(small_recipe("moco_v3", model, train=train)).double()


def gradients(method: Method, micro_batch: int = 0) -> dict[str, Tensor]:
    """The loss and all gradients of a step, and the running statistics after it."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    batch = GlobalBatch(views, BatchInfo(torch.arange(BATCH)), Progress(0, 1), None, lambda view: view)
    method.zero_grad()
    accelerator = Accelerator(cpu=True)
    if micro_batch:
        loss = sliced_step(accelerator, method, batch, micro_batch, lambda _: None).loss
    else:
        loss = whole_batch_step(accelerator, method, batch).loss
    found = {name: param.grad for name, param in method.named_parameters() if param.grad is not None}
    return {"loss": loss.detach(), **found, **dict(method.named_buffers())}


@pytest.mark.parametrize(
    ("name", "count"), [("test_vit", 6), ("resnet18", 8), ("test_resnet", 4), ("test_convnext", 4), ("vgg11", 0)]
)
def test_blocks_are_timms(name: str, count: int) -> None:
    with torch.device("meta"):
        assert len(blocks_of(timm.create_model(name))) == count


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[train\] compile: 'vgg11' has no blocks, stages, layers .* set it to true"):
        compile_encoders([nn.Sequential(nn.Linear(2, 2))], "blocks", "vgg11")


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("model", "recompute", "micro_batch"),
    [
        ("test_vit", True, 0),
        ("test_vit", False, 4),
        pytest.param("test_vit", False, 0, marks=pytest.mark.full),
        pytest.param("resnet18", False, 0, marks=pytest.mark.full),
    ],
)
def test_compiled_blocks_give_the_same_numbers(model: str, recompute: bool, micro_batch: int) -> None:
    plain = build(model, recompute=recompute)
    compiled = copy.deepcopy(plain)
    compile_encoders(compiled.backbones(), "blocks", model)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    before = graphs()
    expected = gradients(plain, micro_batch)
    # Of a ResNet's blocks there are more versions than the 8 after which PyTorch goes back to eager by default.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = gradients(compiled, micro_batch)
    assert graphs() > before
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.usefixtures("_quick")
def test_equal_blocks_are_compiled_once() -> None:
    """Once with gradient for the student, once without for the teacher; not again in the next step."""
    method = build("test_vit")
    compile_encoders(method.backbones(), "blocks", "test_vit")
    before = graphs()
    gradients(method)
    assert graphs() - before == 2
    gradients(method)
    assert graphs() - before == 2


def test_blocks_are_compiled_in_student_and_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    method = build("test_vit").float()
    recipe = small_recipe("moco_v3", "test_vit", train={"compile": "blocks"})
    set_up_training(recipe, open_source(recipe.data), Accelerator(cpu=True), method=method)
    assert compiled == [*method.backbone.blocks, *method.teacher_backbone.module.blocks]


@pytest.mark.parametrize(
    ("given", "taken"), [(True, True), (False, False), ("yes", True), (1, True), ("blocks", "blocks")]
)
def test_values_of_the_key(given: Any, taken: Any) -> None:
    recipe = small_recipe("moco_v3", "test_vit", train={"compile": given})
    assert recipe.train.compile == taken
    assert type(recipe.train.compile) is type(taken)
    assert small_recipe("moco_v3", "test_vit", train={"compile": recipe.as_tables()["train"]["compile"]}) == recipe


@pytest.mark.parametrize("given", ["block", 2, ["blocks"], ""])
def test_other_values_are_refused_in_one_sentence(given: Any) -> None:
    with pytest.raises(UserError) as refused:
        small_recipe("moco_v3", "test_vit", train={"compile": given})
    assert str(refused.value) == f'test recipe [train] compile: must be true, false or "blocks", not {given!r}'


@pytest.mark.usefixtures("_quick")
def test_the_warm_up_is_reported_and_left_out() -> None:
    said: list[str] = []
    layer = nn.Linear(2, 2)
    compile_encoders([layer], True, "layer")
    warm_up = WarmUp(True, said.append)
    assert [bool(layer(torch.randn(size, 2)) is None) or warm_up.after_step() for size in (3, 3)] == [True, False]
    assert len(said) == 1
    assert said[0].startswith("compiled: the first step took ")
    layer(torch.randn(7, 2))  # compiles again, for an evaluation
    assert not warm_up.after_step()
    assert len(said) == 1


def test_without_compiling_there_is_no_warm_up() -> None:
    said: list[str] = []
    warm_up = WarmUp(False, said.append)
    assert not warm_up.after_step()
    assert not said


def test_what_happens_once_is_not_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = ThroughputMeter(8)
    now = 60.0
    meter.restart(once=True)
    now = 62.0
    assert meter.end_step() == 4.0
    assert meter.seconds_left(10) == 20.0
    now = 65.0
    meter.restart()
    assert meter.seconds_left(10) == 50.0
