"""The rules of the plan on invented images and machines: values derived by hand, and no warning of the doctor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sslkit.doctor.findings import Report
from sslkit.doctor.image_checks import ImageSummary
from sslkit.doctor.recipe_advice import check_settings
from sslkit.doctor.training_checks import check_batch_norm_leak
from sslkit.errors import UserError
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
    few = (replace(FEW, count=16), replace(FEW, count=33), FEW)
    many = (replace(PHOTOS, count=150_000, processes=2), ON_GPU, ON_GPUS, replace(ON_GPU, count=5000))
    for facts, seconds in [*((each, 0.1) for each in (*few, PHOTOS, GARMENTS, *many)), (FEW, 1e-4)]:
        recipe, _ = planned(facts, seconds, method={"name": name}, backbone={"name": backbone})
        norm = nn.BatchNorm1d(8) if family(backbone) == "resnet" else nn.LayerNorm(8)
        with torch.device("meta"):
            method = find_method(name)(norm, 8, recipe.method)
            method.set_num_samples(facts.count)
        images = ImageSummary(facts.count, facts.height, facts.width, facts.grey)
        found = check_settings(recipe, method, images)
        warned = {each.check: each.sentence for each in found if each.verdict != "ok"}
        small = {"batch size"} if facts.count < 32 else set()  # 16 are small for any method
        assert set(warned) <= small, (facts.count, seconds, warned)
        assert not Report(found).settings()
        assert check_batch_norm_leak(method).verdict != "fault"


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


COPIES = replace(PHOTOS, count=600, copies=400, compared=600)
MIXED = replace(PHOTOS, height=132, width=64, sides=(8, 64, 1000))
VIT14, RESNET = {"name": "vit_small_patch14_dinov2"}, {"name": "test_resnet"}
LOCAL = {"method": {"name": "swav"}, "views": {"local": {"count": 6}}}

# Facts, what is stated, values derived by hand, and a part of the reason of the first of them.
FITTED: list[tuple[Facts, dict[str, dict[str, Any]], dict[str, Any], str]] = [
    (COPIES, {}, {"method.queue_size": 64, "train.batch_size": 32}, "at most half of the 200 different images"),
    (COPIES, {"method": {"name": "swav"}}, {"method.prototypes": 8}, "25 of the 200 different images for each"),
    (COPIES, {"method": {"name": "instdisc"}}, {"method.negatives": 64}, "half of the 200 different images"),
    (PHOTOS, {"backbone": VIT14}, {"views.size": 70}, "70 instead of 64, a whole number of patches of 14"),
    (replace(PHOTOS, height=500, width=300), {"backbone": VIT14}, {"views.size": 98}, "at most 96 on a CPU; 98"),
    (replace(ON_GPU, height=170, width=200), {"backbone": VIT14}, {"views.size": 154}, "154 instead of 160"),
    (ON_GPU, {"backbone": VIT14}, {"views.size": 224, "method.bn_groups": 1}, "have 375 pixels on the shorter side"),
    (MIXED, {}, {"views.size": 64}, "the images have 64 (the median; from 8 to 1000) pixels on the shorter side"),
    (PHOTOS, {"schedule": {"milestones": [30, 60]}}, {"schedule.decay": "steps"}, "at the milestones"),
    (PHOTOS, {"schedule": {"decay": "steps"}}, {"schedule.milestones": [92.4, 123.2]}, "60% and 80%"),  # of 154
    (PHOTOS, {"views": {"blur_prob": 0.5}}, {"views.blur_sigma": (0.1, 0.57)}, "2 pixels of 224, for 64"),  # 2 / 3.5
    (PHOTOS, {"views": {"global1": {"blur_prob": 1.0}}}, {"views.blur_sigma": (0.1, 0.57)}, "for 64"),
    (PHOTOS, LOCAL, {"views.local.size": 24}, "the paper's 96 beside 224, for 64"),  # 27.4
    (ON_GPU, {**LOCAL, "views": {"policy": "swav"}}, {"views.local.size": 96}, "for 224"),
    (PHOTOS, {"optim": {"lr_rule": "linear"}}, {"optim.lr": 0.004}, "a peak of 0.001 with the linear rule"),  # 1e-3 * 4
    (ON_GPUS, {"optim": {"lr_rule": "sqrt"}}, {"optim.lr": 0.001}, "a peak of 0.002 with the sqrt rule"),  # 2e-3 / 2
    (PHOTOS, {"optim": {"name": "lars"}}, {"optim.lr": 0.2, "optim.weight_decay": 1.5e-6}, "of BYOL"),
    (PHOTOS, {"optim": {"name": "larc"}, "method": {"name": "swav"}}, {"optim.lr": 0.6}, "of SwAV, for a batch of 256"),
    (PHOTOS, {"optim": {"name": "lamb"}}, {"optim.lr": 0.0018, "optim.lr_rule": "sqrt"}, "ResNet strikes back"),
    (PHOTOS, {"method": {"bn_groups": 3}}, {"train.batch_size": 63}, "divides into 3 BatchNorm groups"),
    (PHOTOS, {"method": {"bn_groups": 64}}, {"train.batch_size": 128}, "divides into 64 BatchNorm groups"),
    (replace(PHOTOS, count=150_000), {"method": {"name": "simclr"}}, {"train.batch_size": 256}, "goes down to 256"),
    (
        replace(PHOTOS, count=150_000, processes=3),
        {"method": {"name": "simclr"}},
        {"train.batch_size": 258},  # 255 would be below the paper's 256
        "goes down to 256",
    ),
    (FEW, {"train": {"micro_batch": 64}}, {"train.batch_size": 64, "method.bn_groups": 4}, "divides into slices of 64"),
    (FEW, {"train": {"micro_batch": 16}}, {"train.batch_size": 32}, "so that an epoch has 6 steps"),
    (PHOTOS, {"method": {"name": "swav", "prototypes": 3000}}, {"method.queue_size": 2944}, "codes"),  # 46 * 64
    (PHOTOS, {"backbone": {"name": "test_vit"}}, {"method.bn_groups": 1}, "the backbone has no BatchNorm"),
    (PHOTOS, {"train": {"batch_size": 33}}, {"method.bn_groups": 1}, "a batch of 33 has no equal groups"),
    (replace(FEW, count=16), {"method": {"name": "swav"}}, {"method.prototypes": 2}, "8 of the 16 different images"),
    (replace(PHOTOS, count=20_000, hours=20), {}, {"method.momentum_half_life": 177_000.0}, "(momentum 0.99975)"),
]


@pytest.mark.parametrize("case", FITTED, ids=lambda case: f"{case[0].count} {case[1]}"[:60])
def test_what_is_planned_fits_what_is_stated(case: tuple[Facts, dict[str, Any], dict[str, Any], str]) -> None:
    facts, stated, expected, reason = case
    recipe, draft = planned(facts, 1.0 if facts.device == "cpu" else 0.1, **{"backbone": RESNET, **stated})
    tables = recipe.as_tables()
    for key, value in expected.items():
        table, _, name = key.partition(".")
        found = tables[table]["local"]["size"] if name == "local.size" else getattr(getattr(recipe, table), name)
        assert found == value, key
    assert reason in draft.choices[next(iter(expected))].reason


def test_the_peak_is_as_planned_under_any_rule() -> None:
    for rule in ("none", "linear", "sqrt"):
        for facts in (PHOTOS, FEW, ON_GPUS):
            recipe, _ = planned(facts, 1.0, optim={"lr_rule": rule})
            expected = 1e-3 * max(recipe.train.batch_size / 256, 1) ** 0.5
            assert recipe.peak_lr == pytest.approx(expected, rel=0.05)


def test_a_stated_warmup_that_does_not_fit_names_the_hours() -> None:
    short = replace(PHOTOS, hours=0.02)  # 3 epochs of 21 steps of 1 s
    with pytest.raises(UserError, match=r"do not fit in 3 epochs, all that 1m12s \(--hours\) allow") as refused:
        planned(short, 1.0, schedule={"warmup_epochs": 10.0})
    assert "--hours 0.2 fits, or --set schedule.warmup_epochs=0.3" in str(refused.value)  # 30 * 21 s / 0.9
    recipe, _ = planned(replace(short, hours=0.2), 1.0, schedule={"warmup_epochs": 10.0})
    assert recipe.train.epochs == 30
    with pytest.raises(UserError, match=r"--set train\.epochs=1500 fits"):
        planned(replace(PHOTOS, hours=1000), 1.0, schedule={"warmup_epochs": 500.0})


def test_facts_of_images_of_many_sizes_and_of_copies() -> None:
    assert "about 64 x 132 pixels (medians; shorter side from 8 to 1000)" in MIXED.lines()[0]
    assert "about 64 x 64 pixels, 54 classes" in PHOTOS.lines()[0]
    _, draft = planned(COPIES, 1.0)
    assert rules.hints(draft, COPIES, 1.0)[0].startswith("200 different images are few")


def test_pretrained_weights_get_a_low_rate() -> None:
    recipe, draft = planned(PHOTOS, 1.0, backbone={"name": "test_resnet.r160_in1k", "pretrained": True})
    assert recipe.optim.lr == 1e-4
    assert not any("adapt" in hint for hint in rules.hints(draft, PHOTOS, 1.0))


def test_hints_on_few_images_and_few_updates() -> None:
    _, draft = planned(replace(FEW, hours=0.01), 1.0)  # 5 epochs of 6 steps
    hints = rules.hints(draft, FEW, 1.0)
    # 34 epochs of 6 steps are 204 updates: 204 s / 0.9
    assert hints[0] == "30 updates are too few to learn much: --hours 0.07 or more"
    assert hints[1].endswith("sslkit adapt resnet18.a1_in1k --data photos")
    _, draft = planned(FEW, 1.0, train={"epochs": 5})
    assert rules.hints(draft, FEW, 1.0)[0].endswith(": --set train.epochs=34 or more")  # the doctor's number
    tiny = replace(FEW, count=33)  # one step an epoch, 400 epochs at most
    assert len(rules.hints(planned(tiny, 1e-4)[1], tiny, 1e-4)) == 1
    _, draft = planned(ON_GPU, 0.5)
    assert rules.hints(draft, ON_GPU, 0.5) == []
