"""Steps of training against independent plain loops (tests/golden), in float64 and through the whole engine."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_recipe
from golden.moco_v1v2 import train_moco
from golden.moco_v3 import NaiveLars, train_moco_v3
from torch import Tensor, nn

import sslkit
from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.order.epoch_order import epoch_order
from sslkit.data.sources.image_source import open_source
from sslkit.engine.optim import learning_rate, make_optimizer, set_learning_rate
from sslkit.engine.setup import build_method
from sslkit.engine.step import shuffle_order
from sslkit.methods import BatchInfo, Progress
from sslkit.parts.schedules import cosine
from sslkit.recipe.resolve import Recipe

STEPS, TOTAL = 5, 10


def random_batches(steps: int, batch: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(x, x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in first]


def assert_same_state(ours: nn.Module, theirs: dict[str, Tensor], prefix: str, rtol: float) -> None:
    for name, value in ours.state_dict().items():
        expected = theirs[f"{prefix}.{name}"]
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=rtol, atol=rtol, msg=f"{prefix}.{name}")


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_queue_methods_follow_the_oracle(name: str) -> None:
    recipe = small_recipe(name, "test_resnet", method={"queue_size": 20, "bn_groups": 2, "momentum": 0.9})
    torch.manual_seed(0)
    method = build_method(recipe).double()
    batches = random_batches(STEPS, 8)
    permutations = [np.random.default_rng(step).permutation(8) for step in range(STEPS)]
    oracle = train_moco(
        method.backbone,
        method.projector,
        method.queue.keys.T.clone(),
        batches,
        [torch.from_numpy(order) for order in permutations],
        groups=2,
        lr=0.05,
        weight_decay=1e-4,
        sgd_momentum=0.9,
        teacher_momentum=0.9,
        temperature=recipe.method.temperature,
    )
    optimizer = make_optimizer(recipe, method)
    set_learning_rate(optimizer, 0.05)
    for step, (views, order) in enumerate(zip(batches, permutations, strict=True)):
        result = method(views, BatchInfo(torch.arange(8)), Progress(0, 1), order)
        assert result.loss.item() == pytest.approx(oracle.losses[step], rel=1e-9)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(step + 1, TOTAL))
    assert_same_state(method.backbone, oracle.student, "backbone", 1e-8)
    assert_same_state(method.projector, oracle.student, "head", 1e-8)
    assert_same_state(method.teacher_backbone.module, oracle.teacher, "backbone", 1e-8)
    assert_same_state(method.teacher_projector.module, oracle.teacher, "head", 1e-8)
    torch.testing.assert_close(method.queue.keys, oracle.queue.T, rtol=1e-8, atol=1e-8)
    assert method.queue.pointer.item() == oracle.pointer == 40 % 20


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_v3_follows_the_oracle(backbone: str) -> None:
    optim = {"lr": 0.01, "weight_decay": 0.1}
    recipe = small_recipe("moco_v3", backbone, optim=optim)
    torch.manual_seed(0)
    method = build_method(recipe).double()
    batches = random_batches(STEPS, 8)
    lrs = [0.002 * (step + 1) for step in range(STEPS)]
    momenta = [cosine(step + 1, TOTAL, 0.99, 1.0) for step in range(STEPS)]

    def factory(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if recipe.optim.name == "lars":
            return NaiveLars(params, lr=0.0, wd=0.1)
        return torch.optim.AdamW(params, lr=0.0, weight_decay=0.1)

    oracle = train_moco_v3(
        method.backbone,
        method.projector,
        method.predictor,
        batches,
        recipe.method.temperature,
        factory,
        lrs,
        momenta,
    )
    frozen = copy.deepcopy({n: p for n, p in method.backbone.named_parameters() if not p.requires_grad})
    optimizer = make_optimizer(recipe, method)
    for step, views in enumerate(batches):
        set_learning_rate(optimizer, lrs[step])
        result = method(views, BatchInfo(torch.arange(8)), Progress(0, 1))
        assert result.loss.item() == pytest.approx(oracle.losses[step], rel=1e-9)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert method.after_update(Progress(step + 1, TOTAL)) == {"momentum": pytest.approx(momenta[step], abs=1e-15)}
    for part in ("backbone", "projector", "predictor"):
        assert_same_state(getattr(method, part), oracle.student, part, 1e-8)
    assert_same_state(method.teacher_backbone.module, oracle.teacher, "backbone", 1e-8)
    assert_same_state(method.teacher_projector.module, oracle.teacher, "projector", 1e-8)
    teacher = dict(method.teacher_backbone.module.named_parameters())
    for name, before in frozen.items():
        assert torch.equal(dict(method.backbone.named_parameters())[name], before)
        assert torch.equal(teacher[name], before)
    assert bool(frozen) == (backbone == "test_vit")


def views_of(recipe: Recipe, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The batches a run will see, by the definition: order of (seed, epoch), view of (seed, epoch, sample, view)."""
    source = open_source(recipe.data)
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    per_epoch = len(source) // recipe.train.batch_size
    batches = []
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(recipe.train.seed, epoch, len(source))
        chosen = order[position * recipe.train.batch_size : (position + 1) * recipe.train.batch_size]
        cut = np.stack([pipeline(source.read(int(i)), epoch, int(i)) for i in chosen], axis=1)
        first, second = (normalise(torch.from_numpy(v), recipe.views.mean, recipe.views.std) for v in cut)
        batches.append((first, second))
    return batches


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3"])
def test_the_engine_follows_the_oracle(name: str, tmp_path: Path) -> None:
    backbone = {"moco_v2": "test_resnet", "moco_v3": "test_vit"}[name]
    # A low rate for v2: over groups of 16 images BatchNorm makes float32 rounding grow with every step.
    optim = {"lr": 0.003} if name == "moco_v2" else {}
    recipe = small_recipe(name, backbone, schedule={"warmup_epochs": 0.05}, optim=optim)
    run = sslkit.train(recipe, tmp_path / "run")
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe)
    steps, per_epoch = 6, 2000 // 32
    batches = views_of(recipe, steps)
    rates = [learning_rate(recipe, step, per_epoch) for step in range(steps)]
    assert [row["lr"] for row in run.metrics()] == rates
    if name == "moco_v2":
        losses = train_moco(
            method.backbone,
            method.projector,
            method.queue.keys.T.clone(),
            batches,
            [torch.from_numpy(shuffle_order(recipe, step)) for step in range(steps)],
            groups=2,
            lr=rates,
            weight_decay=1e-4,
            sgd_momentum=0.9,
            teacher_momentum=0.999,
            temperature=0.2,
        ).losses
    else:
        losses = train_moco_v3(
            method.backbone,
            method.projector,
            method.predictor,
            batches,
            0.2,
            lambda params: torch.optim.AdamW(params, lr=0.0, weight_decay=0.1),
            rates,
            [cosine(step + 1, per_epoch, 0.99, 1.0) for step in range(steps)],
        ).losses
    assert [row["loss"] for row in run.metrics()] == pytest.approx(losses, rel=2e-5)
