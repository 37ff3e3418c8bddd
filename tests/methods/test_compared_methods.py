"""The methods MoCo is compared with, and its symmetric form, step by step against independent loops, in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe
from golden.byol import byol_momentum, train_byol
from golden.instdisc import train_instdisc
from golden.mechanisms import train_end_to_end, train_memory_bank, train_symmetric_moco
from golden.moco_v3 import NaiveLars
from golden.simclr import NaiveSimclrLars, train_simclr
from golden.swav import NaiveLarc, train_swav
from torch import Tensor, nn

from sslkit.engine.optim import make_optimizer, set_learning_rate
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.recipe.resolve import Recipe

STEPS, TOTAL, BATCH, SAMPLES = 5, 10, 8, 20
RATES = [0.3, 0.2, 0.25, 0.1, 0.3]
IDS = [torch.from_numpy(np.random.default_rng(step).permutation(SAMPLES)[:BATCH]) for step in range(STEPS)]
ORDERS = [np.random.default_rng(100 + step).permutation(BATCH) for step in range(STEPS)]
PERMUTATIONS = [torch.from_numpy(order) for order in ORDERS]
BACKBONES = ["test_resnet", "test_vit"]


def crops(sizes: Sequence[int] = (32, 32)) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(STEPS):
        base = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        noisy = [base + 0.3 * torch.randn(base.shape, generator=generator, dtype=torch.float64) for _ in sizes]
        batches.append([nn.functional.interpolate(view, size=size) for view, size in zip(noisy, sizes, strict=True)])
    return batches


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(first, second) for first, second in crops()]


def prepare(name: str, backbone: str, /, **tables: dict[str, Any]) -> tuple[Recipe, Method]:
    recipe = small_recipe(name, backbone, **tables)
    torch.manual_seed(0)
    return recipe, build_method(recipe, num_samples=SAMPLES).double()


def train(recipe: Recipe, method: Method, batches: Sequence[Sequence[Tensor]]) -> list[float]:
    optimizer = make_optimizer(recipe, method)
    losses = []
    for step, views in enumerate(batches):
        set_learning_rate(optimizer, RATES[step])
        result = method(views, BatchInfo(IDS[step]), Progress(step, 100), ORDERS[step] if method.shuffle_keys else None)
        result.loss.backward()
        method.before_update(Progress(step, TOTAL))
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(step + 1, TOTAL))
        losses.append(result.loss.item())
    return losses


def assert_same(ours: nn.Module, theirs: dict[str, Tensor], prefix: str) -> None:
    for name, value in ours.state_dict().items():
        expected = theirs[f"{prefix}.{name}"]
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=1e-8, atol=1e-8, msg=f"{prefix}.{name}")


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layers", [2, 3])
def test_simclr(backbone: str, layers: int) -> None:
    recipe, method = prepare("simclr", backbone, method={"projector_layers": layers}, optim={"weight_decay": 0.1})
    oracle = train_simclr(
        method.backbone, method.projector, pairs(), 0.1, lambda params: NaiveSimclrLars(params, lr=0.0, wd=0.1), RATES
    )
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    assert_same(method.backbone, oracle.student, "backbone")
    assert_same(method.projector, oracle.student, "projector")
    assert not method.projector[-1].bias.any()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_byol(backbone: str) -> None:
    recipe, method = prepare("byol", backbone, optim={"weight_decay": 0.1})
    momenta = [byol_momentum(step, TOTAL, 0.996) for step in range(STEPS)]
    oracle = train_byol(
        method.backbone,
        method.projector,
        method.predictor,
        pairs(),
        lambda params: NaiveLars(params, lr=0.0, wd=0.1),
        RATES,
        momenta,
    )
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    for part in ("backbone", "projector", "predictor"):
        assert_same(getattr(method, part), oracle.student, part)
    assert_same(method.teacher_backbone.module, oracle.teacher, "backbone")
    assert_same(method.teacher_projector.module, oracle.teacher, "projector")


@pytest.mark.parametrize(
    ("backbone", "sizes"), [("test_resnet", (32, 32, 16, 16, 16)), ("test_resnet", (32, 32)), ("test_vit", (32,) * 4)]
)
@pytest.mark.parametrize("queue", [0, 16])
def test_swav(backbone: str, sizes: tuple[int, ...], queue: int) -> None:
    swav_follows_the_oracle(backbone, sizes, queue)


def swav_follows_the_oracle(backbone: str, sizes: tuple[int, ...], queue: int, more: int = 0) -> None:
    """``more``: by how many rows the recipe's queue is longer than the one that the official code keeps."""
    options = {"queue_size": queue + more, "queue_start_epoch": 1, "freeze_prototypes_steps": 2}
    recipe, method = prepare("swav", backbone, method=options, optim={"weight_decay": 0.1})
    oracle = train_swav(
        method.backbone,
        method.projector,
        method.prototypes,
        crops(sizes),
        0.1,
        0.05,
        3,
        lambda params: NaiveLarc(params, lr=0.0, wd=0.1),
        RATES,
        frozen_steps=2,
        queue_length=queue,
        queue_start=1,
    )
    assert train(recipe, method, crops(sizes)) == pytest.approx(oracle.losses, rel=1e-9)
    for part in ("backbone", "projector", "prototypes"):
        assert_same(getattr(method, part), oracle.student, part)
    if queue:
        assert oracle.queue_used == [False, False, False, True, True]
        assert oracle.queue is not None
        for crop, rows in enumerate(oracle.queue):
            ours = method.queues[crop].keys[:queue]
            torch.testing.assert_close(ours.sort(dim=0).values, rows.sort(dim=0).values, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("more", [1, 7])
def test_swavs_queue_is_trimmed_to_a_multiple_of_the_batch(more: int) -> None:
    """Official: ``queue_length -= queue_length % (batch_size * world_size)``, here at batch 8."""
    swav_follows_the_oracle("test_resnet", (32, 32), 16, more)
    swav_follows_the_oracle("test_resnet", (32, 32), 0, more)


def noise_of(method: Method, negatives: int) -> list[Tensor]:
    """The rows the method will draw; that they are uniform is another test's business."""
    drawn = []
    for step in range(STEPS):
        method.bank.draws.fill_(step)
        drawn.append(method.bank.draw_noise(BATCH, negatives))
    method.bank.draws.zero_()
    return drawn


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_instdisc(backbone: str, loss: str) -> None:
    recipe, method = prepare("instdisc", backbone, method={"loss": loss})
    oracle = train_instdisc(
        method.backbone,
        method.projector,
        method.bank.rows.clone(),
        [first for first, _ in pairs()],
        IDS,
        noise_of(method, 24) if loss == "nce" else None,
        0.07,
        sgd,
        RATES,
    )
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    assert_same(method.backbone, oracle.student, "backbone")
    assert_same(method.projector, oracle.student, "projector")
    torch.testing.assert_close(method.bank.rows, oracle.bank, rtol=1e-8, atol=1e-8)
    if loss == "nce":
        assert method.normaliser.item() == pytest.approx(oracle.z, rel=1e-9)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_memory_bank(backbone: str) -> None:
    recipe, method = prepare("memory_bank", backbone)
    oracle = train_memory_bank(
        method.backbone,
        method.projector,
        method.bank.rows.clone(),
        [first for first, _ in pairs()],
        IDS,
        noise_of(method, 24),
        0.07,
        sgd,
        RATES,
    )
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    assert_same(method.backbone, oracle.student, "backbone")
    torch.testing.assert_close(method.bank.rows, oracle.bank, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_end_to_end(backbone: str) -> None:
    recipe, method = prepare("end_to_end", backbone)
    groups = 2 if backbone == "test_resnet" else 1
    oracle = train_end_to_end(method.backbone, method.projector, pairs(), PERMUTATIONS, groups, 0.07, sgd, RATES)
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    trained = dict(method.backbone.named_parameters())
    for name, value in trained.items():
        torch.testing.assert_close(value.detach(), oracle.student[f"backbone.{name}"], rtol=1e-8, atol=1e-8)
    assert_same(method.projector, oracle.student, "projector")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_symmetric_moco_v2(backbone: str) -> None:
    recipe, method = prepare("moco_v2", backbone, method={"symmetric": True, "queue_size": 24, "momentum": 0.9})
    groups = 2 if backbone == "test_resnet" else 1
    oracle = train_symmetric_moco(
        method.backbone,
        method.projector,
        method.queue.keys.T.clone(),
        pairs(),
        PERMUTATIONS,
        groups,
        0.2,
        sgd,
        RATES,
        [0.9] * STEPS,
    )
    assert train(recipe, method, pairs()) == pytest.approx(oracle.losses, rel=1e-9)
    assert_same(method.projector, oracle.student, "projector")
    for name, value in method.backbone.named_parameters():
        torch.testing.assert_close(value.detach(), oracle.student[f"backbone.{name}"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(method.queue.keys.T, oracle.queue, rtol=1e-8, atol=1e-8)
    assert method.queue.pointer.item() == oracle.pointer
