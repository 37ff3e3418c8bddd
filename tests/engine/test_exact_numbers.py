"""Every number of a short run against the formula of its step: rates, momenta, orders, seeds, who moves when.

A wrong one of these trains all the same, only worse; nothing else would notice.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe
from torch import Tensor, nn
from torch.nn.functional import normalize

import sslkit
from sslkit.data.augment.parameters import draw_params
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.order.mixture import Mixture
from sslkit.engine import step as step_module
from sslkit.engine.optim import learning_rate, make_optimizer
from sslkit.engine.setup import build_method
from sslkit.methods import METHODS, BatchInfo, Method, Progress
from sslkit.methods.byol import BYOL
from sslkit.methods.moco_v2 import MoCoV2
from sslkit.methods.moco_v3 import MoCoV3

SEED, IMAGES, BATCH, EPOCHS = 11, 40, 16, 3
PER_EPOCH = IMAGES // BATCH
TOTAL = EPOCHS * PER_EPOCH
SCHEDULE = {"decay": "cosine", "warmup_epochs": 1, "warmup_start": 0.25, "final": 0.1, "per": "step"}
PEAK = 0.02 * BATCH / 256


class Diary:
    """What a method was given and was asked to do, step by step."""

    def __init__(self) -> None:
        self.before: list[Progress] = []
        self.after: list[Progress] = []
        self.ids: list[list[int]] = []
        self.seeds: list[int] = []
        self.orders: list[list[int]] = []
        self.weights: list[Tensor] = []  # before each optimizer step, and after it, in turn
        self.teacher: list[Tensor] = []


def watched(method: type[Any], diary: Diary) -> type[Method]:
    class Watched(method):  # type: ignore[misc]
        def weight(self) -> Tensor:
            return torch.cat([param.detach().flatten() for param in self.projector.parameters()])

        def student_in_slices(self, views: Any, slices: int, permutation: Any = None, *rest: Any) -> Any:
            diary.seeds.append(torch.initial_seed())
            diary.orders.append([] if permutation is None else permutation.tolist())
            return super().student_in_slices(views, slices, permutation, *rest)

        def objective(self, student: Any, teacher: Any, batch: BatchInfo, progress: Progress) -> Any:
            diary.ids.append(batch.sample_ids.tolist())
            return super().objective(student, teacher, batch, progress)

        def before_update(self, progress: Progress) -> None:
            diary.before.append(progress)
            diary.weights.append(self.weight())

        def after_update(self, progress: Progress) -> dict[str, float]:
            diary.after.append(progress)
            diary.weights.append(self.weight())
            logged: dict[str, float] = super().after_update(progress)
            own = self.teacher_projector.parameters()
            diary.teacher.append(torch.cat([param.detach().flatten().clone() for param in own]))
            return logged

    return Watched


def run(method: type[Method], name: str, folder: Path, data: Path) -> tuple[Diary, list[dict[str, Any]]]:
    diary = Diary()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, name, watched(method, diary))
        recipe = small_recipe(
            name,
            "test_vit",
            data={"path": str(data), "split": "train", "workers": 0},
            train={"epochs": EPOCHS, "batch_size": BATCH, "max_steps": 0, "seed": SEED},
            optim={"name": "sgd", "lr": 0.02, "weight_decay": 0.0},
            schedule=SCHEDULE,
            monitor={"diagnose_every": 0},
        )
        done = sslkit.train(recipe, folder)
    return diary, done.metrics()


Ran = dict[str, tuple[Diary, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def ran(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    methods = {"moco_v3": MoCoV3, "byol": BYOL, "moco_v2": MoCoV2}
    folder = tmp_path_factory.mktemp("exact")
    return {name: run(method, name, folder / name, class_folders) for name, method in methods.items()}


def test_progress_counts_the_updates_before_and_after(ran: Ran) -> None:
    for diary, _ in ran.values():
        assert diary.before == [Progress(step, TOTAL, PER_EPOCH, BATCH) for step in range(TOTAL)]
        assert diary.after == [Progress(step + 1, TOTAL, PER_EPOCH, BATCH) for step in range(TOTAL)]


def test_momentum_of_each_step(ran: Ran) -> None:
    """MoCo v3's clock is at k after update k, BYOL's one before it (their official code); MoCo v2's stands still."""

    def rising(start: float, share: float) -> float:
        return 1 - (1 - start) * (1 + math.cos(math.pi * share)) / 2

    expected = {
        "moco_v3": [rising(0.99, (step + 1) / TOTAL) for step in range(TOTAL)],
        "byol": [rising(0.996, step / TOTAL) for step in range(TOTAL)],
        "moco_v2": [0.999] * TOTAL,
    }
    for name, (diary, rows) in ran.items():
        assert [row["momentum"] for row in rows] == pytest.approx(expected[name], rel=1e-12)
        for step, momentum in enumerate(expected[name]):
            before = diary.teacher[step - 1] if step else diary.weights[0]
            moved = momentum * before.double() + (1 - momentum) * diary.weights[2 * step + 1].double()
            torch.testing.assert_close(diary.teacher[step].double(), moved, rtol=1e-6, atol=1e-7)


def test_rate_of_each_step(ran: Ran) -> None:
    warm = [PEAK * (0.25 + 0.75 * step / PER_EPOCH) for step in range(PER_EPOCH)]
    left = TOTAL - PER_EPOCH
    falling = [PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * step / left)) / 2) for step in range(left)]
    for _, rows in ran.values():
        assert [row["lr"] for row in rows] == pytest.approx([*warm, *falling], rel=1e-12)


def test_the_optimizer_steps_between_the_two_calls(ran: Ran) -> None:
    for diary, _ in ran.values():
        for step in range(TOTAL):
            assert not torch.equal(diary.weights[2 * step], diary.weights[2 * step + 1])
            if step:
                assert torch.equal(diary.weights[2 * step - 1], diary.weights[2 * step])


def test_samples_of_each_step(ran: Ran) -> None:
    expected = []
    for epoch in range(EPOCHS):
        order = np.random.Generator(np.random.Philox(key=[SEED, epoch])).permutation(IMAGES)
        expected += [order[start : start + BATCH].tolist() for start in range(0, PER_EPOCH * BATCH, BATCH)]
    assert expected[0] != expected[PER_EPOCH]
    for diary, _ in ran.values():
        assert diary.ids == expected


def test_key_permutation_of_each_step(ran: Ran) -> None:
    diary, _ = ran["moco_v2"]
    assert diary.orders == [
        np.random.default_rng([SEED, 1, step, 0, 0]).permutation(BATCH).tolist() for step in range(TOTAL)
    ]
    assert len({tuple(order) for order in diary.orders}) == TOTAL
    assert ran["moco_v3"][0].orders == [[]] * TOTAL


def test_dropout_seed_of_each_step(ran: Ran) -> None:
    expected = [
        int(np.random.SeedSequence([SEED, 2, step, 0, 0]).generate_state(1, np.uint64)[0] >> 1) for step in range(6)
    ]
    assert TOTAL == len(set(expected)) == 6
    for diary, _ in ran.values():
        assert diary.seeds == expected


@pytest.mark.parametrize(("rule", "factor"), [("linear", 1024 / 256), ("sqrt", 2.0), ("none", 1.0)])
def test_how_the_rate_follows_the_batch(rule: str, factor: float) -> None:
    recipe = small_recipe(train={"batch_size": 1024}, optim={"lr": 0.3, "lr_rule": rule})
    assert recipe.peak_lr == pytest.approx(0.3 * factor)
    assert make_optimizer(recipe, build_method(recipe)).param_groups[0]["lr"] == pytest.approx(0.3 * factor)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_betas_are_the_recipes(name: str) -> None:
    recipe = small_recipe(optim={"name": name, "lr": 0.1, "weight_decay": 0.3, "betas": [0.8, 0.95]})
    (group,) = make_optimizer(recipe, build_method(recipe)).param_groups
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.8, 0.95), 0.3)


STEPWISE = {
    "decay": "steps",
    "milestones": [2, 3],
    "factor": 0.5,
    "warmup_epochs": 1,
    "warmup_start": 0.5,
    "per": "step",
}
RATES: list[
    tuple[dict[str, Any], list[float]]
] = [  # rates of steps 0, 5, 10, 15 ... of ten steps an epoch, four epochs
    (STEPWISE, [0.5, 0.75, 1, 1, 0.5, 0.5, 0.25, 0.25]),
    ({"decay": "constant", "warmup_epochs": 2, "per": "step"}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    (
        {"decay": "cosine", "final": 0.2, "per": "epoch"},
        [0.2 + 0.4 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 0, 1, 1, 2, 2, 3, 3)],
    ),
]


@pytest.mark.parametrize(("schedule", "shares"), RATES)
def test_schedules_by_hand(schedule: dict[str, Any], shares: list[float]) -> None:
    recipe = small_recipe(train={"epochs": 4}, schedule=schedule)
    rates = [learning_rate(recipe, step, 10) for step in range(0, 40, 5)]
    assert rates == pytest.approx([recipe.peak_lr * share for share in shares], rel=1e-12, abs=1e-15)


def pretend(method: nn.Module, step: int = 0, **train: Any) -> Any:
    """As much of a `TrainingState` as the functions of a step look at."""
    clip = torch.nn.utils.clip_grad_norm_
    accelerator = SimpleNamespace(clip_grad_norm_=clip, scaler=None)
    recipe = small_recipe("byol", train={"epochs": 5, **train})
    return SimpleNamespace(
        recipe=recipe,
        method=method,
        wrapped=method,
        accelerator=accelerator,
        steps_per_epoch=10,
        step=step,
        progress=Progress(step, 50, 10),
    )


@pytest.mark.parametrize(("clip_norm", "left"), [(0.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_clipping_of_the_gradient(clip_norm: float, left: list[float]) -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert step_module.clip_gradients(pretend(net, clip_norm=clip_norm)).item() == pytest.approx(5.0)
    assert net.weight.grad[0].tolist() == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize(("step", "rests"), [(0, True), (14, True), (15, False), (40, False)])
def test_how_long_only_the_heads_learn(step: int, rests: bool) -> None:
    torch.manual_seed(0)
    method = build_method(small_recipe("byol", "test_vit"))
    for param in method.parameters():
        param.grad = torch.ones_like(param)
    step_module.prepare_gradients(pretend(method, step, head_warmup_epochs=1.5))
    assert all((param.grad is None) == rests for param in method.backbone.parameters())
    assert all(param.grad is not None for param in method.projector.parameters())


@pytest.mark.parametrize("name", ["instdisc", "memory_bank"])
@pytest.mark.parametrize("momentum", [0.2, 0.9])
def test_memories_keep_the_share_that_the_recipe_says(name: str, momentum: float) -> None:
    """At the papers' 0.5 old and new could change places unseen."""
    torch.manual_seed(0)
    method = build_method(small_recipe(name, "test_vit", method={"bank_momentum": momentum}), num_samples=9).double()
    views = [torch.randn(3, 3, 32, 32, dtype=torch.float64)] * 2
    ids, before = torch.tensor([4, 0, 7]), method.bank.rows.clone()
    method(views, BatchInfo(ids), Progress(0, 1))
    new = normalize(method.projector(method.backbone(views[0])), dim=1)
    method.after_update(Progress(1, 10))
    expected = before.clone()
    expected[ids] = normalize(momentum * before[ids] + (1 - momentum) * new, dim=1)
    torch.testing.assert_close(method.bank.rows, expected, rtol=1e-12, atol=1e-12)


def test_instdiscs_normaliser_is_estimated_once() -> None:
    torch.manual_seed(0)
    method = build_method(small_recipe("instdisc", "test_vit"), num_samples=9).double()
    for step in range(2):
        method(
            [torch.randn(3, 3, 32, 32, dtype=torch.float64) * (1 + step)] * 2,
            BatchInfo(torch.arange(3)),
            Progress(0, 1),
        )
        method.after_update(Progress(step + 1, 10))
        if not step:
            first = method.normaliser.clone()
    assert first > 0
    assert torch.equal(method.normaliser, first)


WORDS: list[Callable[[tuple[int, int, int, int]], tuple[int, int, int, int]]] = [
    lambda key: key,
    lambda key: (key[0] + 1, *key[1:]),
    lambda key: (key[0], key[1] + 1, *key[2:]),
    lambda key: (*key[:2], key[2] + 1, key[3]),
    lambda key: (*key[:3], key[3] + 1),
]


def test_a_views_draw_depends_on_each_word_of_its_key() -> None:
    """Seed, epoch, sample and view, in this order; the first number decides the jitter, the one at 13 the mirror."""
    views = replace_views(flip_prob=0.5, jitter_prob=0.5)
    keys = [change((3, 1, 4, 0)) for change in WORDS]
    drawn = [draw_params(views, key, size=(40, 60)) for key in keys]
    assert len({each.box for each in drawn}) == len(keys)
    for seed, epoch, sample, view in itertools.product((0, 5), range(3), range(4), range(2)):
        numbers = np.random.default_rng([seed, 0, epoch, sample, view]).random(14)
        draw = draw_params(views, (seed, epoch, sample, view), size=(40, 60))
        assert (draw.flip, draw.jitter is not None) == (numbers[13] < 0.5, numbers[0] < 0.5)


def replace_views(**keys: Any) -> Any:
    return small_recipe(views=keys).views


def test_each_lap_through_a_mixed_source_has_an_order_of_its_own() -> None:
    mixture = Mixture(sizes=(8, 24), weights=(1.0, 1.0))  # sixteen of each an epoch: the first source twice
    laps = [np.random.default_rng([3, 5, 0, lap]).permutation(8).tolist() for lap in range(4)]
    for epoch in range(2):
        samples, repeats = mixture.samples(3, epoch)
        assert samples[:16].tolist() == laps[2 * epoch] + laps[2 * epoch + 1]
        assert repeats[:16].tolist() == [0] * 8 + [1] * 8
    assert len({tuple(lap) for lap in laps}) == 4


def test_what_is_blanked_and_how_far_a_view_is_turned() -> None:
    """Each by hand from the numbers of its key; a small crop's hole is a share of the small crop."""
    config = ViewsConfig.of_policy(
        "moco_v2", rotate_degrees=20.0, erase_prob=1.0, erase_scale=(0.1, 0.3), size=200, local={"count": 1, "size": 20}
    )
    for sample, view in itertools.product(range(20), (0, 2)):
        draw = draw_params(config.policy_of("local" if view else "global1"), (1, 0, sample, view), size=(90, 120))
        turn = np.random.default_rng([1, 0, 0, sample, view]).random(15)[14]
        assert draw.angle == pytest.approx(40.0 * turn - 20.0)
        side = 200 if view == 0 else 20
        assert draw.hole is not None
        top, left, height, width = draw.hole
        assert max(top + height, left + width) <= side
        assert 0.06 < height * width / side**2 < 0.36  # sides are whole pixels


@pytest.mark.parametrize(("updates", "frozen"), [(0, True), (2, True), (3, False), (9, False)])
def test_swavs_prototypes_rest_for_as_many_updates_as_the_recipe_says(updates: int, frozen: bool) -> None:
    method = build_method(small_recipe("swav", "test_vit", method={"freeze_prototypes_steps": 3}))
    method.prototypes.weight.grad = torch.ones_like(method.prototypes.weight)
    method.before_update(Progress(updates, 10))
    assert (method.prototypes.weight.grad is None) == frozen


def test_swavs_queue_opens_at_its_epoch_and_counts_once_it_is_full() -> None:
    """Batches of 4, 2 steps an epoch, queue of 8 from epoch 1: steps 2 and 3 fill it, step 4 is the first to use it."""
    torch.manual_seed(0)
    options = {"queue_size": 8, "queue_start_epoch": 1.0}
    method = build_method(small_recipe("swav", "test_vit", method=options, train={"batch_size": 4})).double().train()
    rows = []
    for step in range(6):
        views = [torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sslkit.methods.swav.sinkhorn_codes", counting(rows))
            method(views, BatchInfo(torch.arange(4)), Progress(0, 1))
        method.after_update(Progress(step + 1, 20, 2))
    assert rows == [4] * 8 + [12] * 4  # two assignment crops a step


def counting(rows: list[int]) -> Callable[..., Tensor]:
    def codes(scores: Tensor, *_: Any) -> Tensor:
        rows.append(len(scores))
        return torch.softmax(scores, dim=1).detach()

    return codes
