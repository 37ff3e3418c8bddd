"""A batch in slices against the same batch at once: loss, gradients, statistics, random draws."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_recipe
from torch import Tensor

import sslkit
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.setup import build_method
from sslkit.engine.step import seed_dropout
from sslkit.errors import UserError
from sslkit.methods import METHODS, BatchInfo, Method, Step
from sslkit.parts.schedules import Progress

BATCH = 12
CPU = torch.device("cpu")


def as_is(view: Tensor) -> Tensor:
    return view


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def batch_of(method: Method) -> GlobalBatch:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(4)]
    order = np.random.default_rng(0).permutation(BATCH) if method.shuffle_keys else None
    return GlobalBatch(
        views[: 4 if hasattr(method, "prototypes") else 2], BatchInfo(torch.arange(BATCH)), Progress(0, 1), order, as_is
    )


def build(name: str, model: str, /, **tables: dict[str, object]) -> Method:
    recipe = small_recipe(name, model, train={"batch_size": BATCH}, **tables)
    torch.manual_seed(0)
    return build_method(recipe, num_samples=20).double()


def whole(method: Method) -> Step:
    seed_dropout(0, CPU)
    return whole_batch_step(accelerator(), method, batch_of(method))


def sliced(method: Method, micro_batch: int) -> Step:
    return sliced_step(accelerator(), method, batch_of(method), micro_batch, lambda index: seed_dropout(index, CPU))


def assert_same(ours: Step, expected: Step, one: Method, other: Method) -> None:
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            scale = max(b.grad.norm().item(), 1e-12)
            assert (a.grad - b.grad).norm().item() / scale < 1e-9 or b.grad.norm() < 1e-12, name
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("micro_batch", [1, 4, 6, 12])
@pytest.mark.parametrize("name", METHODS)
def test_slices_of_a_vit_are_exact(name: str, micro_batch: int) -> None:
    one, other = build(name, "test_vit"), build(name, "test_vit")
    assert_same(sliced(one, micro_batch), whole(other), one, other)


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3", "byol", "swav"])
def test_slices_of_a_convnext_are_exact(name: str) -> None:
    one, other = build(name, "test_convnext"), build(name, "test_convnext")
    assert_same(sliced(one, 4), whole(other), one, other)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "end_to_end"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_slices_are_the_groups_of_batch_norm(name: str, symmetric: bool) -> None:
    """Three slices with statistics of their own equal three BN groups: running statistics, shuffles and all."""
    options = {"bn_groups": 3, "symmetric": symmetric}
    one, other = (build(name, "test_resnet", method=options) for _ in range(2))
    assert_same(sliced(one, 4), whole(other), one, other)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_with_micro_batch_splits_batch_norm(name: str) -> None:
    recipe = small_recipe(name, "test_resnet", train={"batch_size": BATCH, "micro_batch": 4})
    method = build_method(recipe, num_samples=20)
    assert method.bn_groups == 3
    fine = small_recipe("moco_v2", "test_resnet", train={"batch_size": 16, "micro_batch": 8}, method={"bn_groups": 8})
    assert build_method(fine).bn_groups == 8


@pytest.mark.parametrize("name", ["moco_v3", "simclr", "end_to_end"])
def test_dropout_is_drawn_again_alike(name: str) -> None:
    """The replayed slice must drop what the first pass dropped: the gradient is that of the loss reported."""
    args = {"args": {"drop_path_rate": 0.4, "proj_drop_rate": 0.3}}
    one = build(name, "test_vit", backbone=args)
    other = copy.deepcopy(one)
    step = sliced(one, 4)
    direction = {n: torch.randn_like(p) for n, p in one.named_parameters() if p.grad is not None}
    predicted = sum(float((p.grad * direction[n]).sum()) for n, p in one.named_parameters() if n in direction)
    nudge = 1e-8
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(other)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                if n in direction:
                    p.add_(direction[n], alpha=sign * nudge)
        losses.append(sliced(moved, 4).loss.item())
    assert step.loss.item() != pytest.approx(whole(other).loss.item(), rel=1e-6)  # dropout is on
    assert (losses[0] - losses[1]) / (2 * nudge) == pytest.approx(predicted, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "model"), [("moco_v3", "test_vit"), ("moco_v2", "test_resnet"), ("simclr", "test_vit")]
)
def test_runs_with_and_without_slices_agree(name: str, model: str, tmp_path: object) -> None:
    """Through the whole engine, in float32; v2's groups are the slices."""
    options = {"bn_groups": 4} if name == "moco_v2" else {}
    losses = []
    for micro_batch in (0, 8):
        recipe = small_recipe(
            name, model, method=options, train={"micro_batch": micro_batch, "max_steps": 3}, optim={"lr": 0.003}
        )
        run = sslkit.train(recipe, f"{tmp_path}/{micro_batch}")
        losses.append([row["loss"] for row in run.metrics()])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_a_micro_batch_must_divide_the_batch(tmp_path: object) -> None:
    recipe = small_recipe("moco_v3", "test_vit", train={"micro_batch": 5})
    with pytest.raises(UserError, match=r"\[train\] micro_batch: 5 does not divide the 32 images"):
        sslkit.train(recipe, f"{tmp_path}/run")


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "accumulate"])
def test_plain_accumulation_is_refused_with_the_reason(key: str) -> None:
    with pytest.raises(UserError, match=r"\[train\] .*fewer negatives.*micro_batch"):
        small_recipe("moco_v3", "test_vit", train={key: 4})
