"""The rules of the plan on invented images and machines: values derived by hand, and no warning of the doctor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sslkit.doctor.image_checks import ImageSummary
from sslkit.doctor.recipe_advice import check_settings
from sslkit.doctor.training_checks import check_batch_norm_leak
from sslkit.methods import METHODS, find_method, method_options
from sslkit.parts.backbone import family
from sslkit.plan import rules
from sslkit.plan.draft import Draft
from sslkit.plan.facts import Facts
from sslkit.recipe.resolve import Recipe, build_recipe

PHOTOS = Facts(
    count=1365,
    height=64,
    width=64,
    grey=False,
    moments=None,
    alpha="",
    copies=0,
    compared=1365,
    classes=54,
    device="cpu",
    bf16=False,
    memory=16 << 30,
    cores=2,
    processes=1,
    hours=1.0,
)
GARMENTS = replace(PHOTOS, count=10_000, height=28, width=28, grey=True, classes=10)
FEW = replace(PHOTOS, count=200, height=300, width=200, classes=0)
ON_GPU = replace(PHOTOS, count=50_000, height=375, width=500, device="cuda", bf16=True)
ON_GPUS = replace(ON_GPU, processes=8, count=500_000)
BANDS = replace(PHOTOS, moments=([0.1] * 5, [0.2] * 5))


def planned(facts: Facts, seconds_per_step: float, **stated: dict[str, Any]) -> tuple[Recipe, Draft]:
    draft = Draft({"data": {"path": "photos"}, **stated})
    for rule in (rules.choose_model, rules.choose_views, rules.choose_batch, rules.choose_optimizer):
        rule(draft, facts)
    rules.choose_length(draft, facts, seconds_per_step)
    rules.choose_options(draft, facts)
    rules.choose_monitor(draft, facts)
    if facts.moments:
        draft.tables["data"]["channels"] = len(facts.moments[0])
    return build_recipe(draft.tables), draft


# Facts, seconds of a step, and what must come out, computed by hand.
CASES: list[tuple[Facts, float, dict[str, Any]]] = [
    (
        PHOTOS,  # 21 steps of 64; 0.9 h / (21 * 1 s) = 154 epochs
        1.0,
        {
            **{"views.size": 64, "train.batch_size": 64, "train.epochs": 154, "method.queue_size": 512},
            **{"views.blur_prob": 0.0, "views.jitter": (0.2, 0.2, 0.2, 0.05), "backbone.zero_init_last": True},
            **{"schedule.warmup_epochs": 15.4, "monitor.every_epochs": 16},
            **{"method.momentum_half_life": 10349.0, "method.bn_groups": 4, "optim.lr": 1e-3},
            "backbone.name": "resnet18",
        },
    ),
    (
        GARMENTS,  # 156 steps of 64; 0.9 h / (156 * 0.1 s) = 207 epochs
        0.1,
        {
            **{"views.size": 64, "views.blur_prob": 0.0, "views.gray_prob": 0.0, "train.epochs": 207},
            **{"views.jitter": (0.2, 0.2, 0.0, 0.0), "method.queue_size": 4096},
        },
    ),
    (
        FEW,  # 6 steps of 32; no labels
        0.001,
        {
            **{"views.size": 96, "train.batch_size": 32, "method.bn_groups": 2},
            **{"method.queue_size": 64, "train.epochs": 400},
            **{"monitor.every_epochs": 0, "monitor.data": ""},
        },
    ),
    (
        ON_GPU,  # 195 steps of 256
        0.5,
        {
            **{"views.size": 224, "train.batch_size": 256, "method.queue_size": 16384, "train.precision": "bf16"},
            **{"train.epochs": 33, "method.bn_groups": 8, "backbone.name": "resnet50", "views.blur_sigma": (0.1, 2.0)},
        },
    ),
    (
        ON_GPUS,
        0.5,
        {
            **{"train.batch_size": 1024, "views.gray_prob": 0.2, "optim.lr": 2e-3, "method.queue_size": 65536},
            **{"train.epochs": 13, "method.bn_groups": 8},
        },
    ),
    (replace(PHOTOS, processes=3), 1.0, {"train.batch_size": 63}),
    (BANDS, 1.0, {"views.mean": (0.1,) * 5, "views.jitter": (0.2, 0.2, 0.0, 0.0)}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0].count))
def test_values_derived_by_hand(case: tuple[Facts, float, dict[str, Any]]) -> None:
    facts, seconds, expected = case
    stated: dict[str, Any] = {}
    if facts.moments:
        stated = {"backbone": {"name": "test_resnet", "args": {"in_chans": 5}}}
    recipe, draft = planned(facts, seconds, **stated)
    for key, value in expected.items():
        table, _, name = key.partition(".")
        assert getattr(getattr(recipe, table), name) == value, key
    assert all(choice.reason for choice in draft.choices.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_the_doctor_has_no_warning_about_a_plan(name: str, backbone: str) -> None:
    for facts in (PHOTOS, GARMENTS, FEW, replace(FEW, count=33), ON_GPU, ON_GPUS, replace(ON_GPU, count=5000)):
        for seconds in (1e-4, 0.3):
            recipe, _ = planned(facts, seconds, method={"name": name}, backbone={"name": backbone})
            norm = nn.BatchNorm1d(8) if family(backbone) == "resnet" else nn.LayerNorm(8)
            with torch.device("meta"):
                method = find_method(name)(norm, 8, recipe.method)
                method.set_num_samples(facts.count)
            images = ImageSummary(facts.count, facts.height, facts.width, facts.grey)
            warned = {each.check: each.sentence for each in check_settings(recipe, method, images)}
            found = [each.check for each in check_settings(recipe, method, images) if each.verdict == "warning"]
            few = {"batch size"}  # the papers' batches are larger than such data and devices allow
            few |= {"schedule"} if facts.count < 1000 else set()
            assert check_batch_norm_leak(method).verdict != "fault"
            assert set(found) <= few, (facts.count, seconds, {check: warned[check] for check in found})


@pytest.mark.parametrize(
    ("processes", "batch_size", "groups"),
    [
        *((1, 64, 4), (1, 16, 2), (1, 31, 1), (1, 2, 1), (1, 50, 2), (1, 2048, 8)),
        *((2, 64, 4), (3, 63, 3), (3, 768, 6), (4, 1024, 8), (16, 1024, 16)),
    ],
)
def test_batch_norm_groups_divide_the_batch_of_a_process(
    monkeypatch: pytest.MonkeyPatch, processes: int, batch_size: int, groups: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert method_options.fitted_bn_groups(batch_size).value == groups
    assert batch_size // processes % (groups // processes) == 0


def test_what_is_stated_is_kept() -> None:
    stated: dict[str, dict[str, Any]] = {
        "method": {"name": "byol", "momentum_half_life": 77.0},
        "views": {"size": 48, "blur_prob": 0.9},
        "train": {"batch_size": 20, "epochs": 7},
        "optim": {"name": "sgd", "lr": 0.5, "weight_decay": 1e-4},
    }
    recipe, draft = planned(PHOTOS, 1.0, **stated)
    for table, keys in stated.items():
        for key, value in keys.items():
            kept = recipe.method_name if (table, key) == ("method", "name") else getattr(getattr(recipe, table), key)
            assert kept == value
            assert f"{table}.{key}" not in draft.choices
    assert recipe.optim.lr_rule == "linear"  # of an optimizer that was stated the plan says nothing


def test_pretrained_weights_get_a_low_rate() -> None:
    recipe, draft = planned(PHOTOS, 1.0, backbone={"name": "test_resnet.r160_in1k", "pretrained": True})
    assert recipe.optim.lr == 1e-4
    assert not any("adapt" in hint for hint in rules.hints(draft, PHOTOS, 1.0))


def test_hints_on_few_images_and_few_updates() -> None:
    _, draft = planned(replace(FEW, hours=0.01), 1.0)  # 5 epochs of 6 steps
    hints = rules.hints(draft, FEW, 1.0)
    assert hints[0] == "30 updates are few; the shortest runs in docs/plan.md have 600: --hours 0.19 or more"
    assert hints[1].endswith("sslkit adapt resnet18.a1_in1k --data photos")
    _, draft = planned(FEW, 1.0, train={"epochs": 5})
    assert rules.hints(draft, FEW, 1.0)[0].endswith("have 600: --set train.epochs=100 or more")
    tiny = replace(FEW, count=33)  # one step an epoch, 400 epochs at most
    assert rules.hints(planned(tiny, 1e-4)[1], tiny, 1e-4)[0].endswith("have 600")
    _, draft = planned(ON_GPU, 0.5)
    assert rules.hints(draft, ON_GPU, 0.5) == []
