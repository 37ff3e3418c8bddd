"""Each piece of advice: what calls for it, and what does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, small_recipe
from torch import nn

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.doctor.findings import Finding, Report
from sslkit.doctor.image_checks import ImageSummary, check_pixels, summarise_images
from sslkit.doctor.recipe_advice import check_settings
from sslkit.engine.monitor.image_variety import Variety
from sslkit.methods import find_method
from sslkit.parts.backbone import create_backbone, family
from sslkit.recipe.resolve import Recipe, load_recipe, shipped_recipes

IMAGENET = ImageSummary(1_281_167, 350, 400, grey=False)
CIFAR = ImageSummary(50_000, 32, 32, grey=False)
FASHION = ImageSummary(10_000, 28, 28, grey=True)


def advise(recipe: Recipe, images: ImageSummary) -> list[Finding]:
    """What the settings call for; the method gets no weights, and a stand-in for its backbone."""
    norm = nn.BatchNorm1d(8) if family(recipe.backbone.name) == "resnet" else nn.LayerNorm(8)
    with torch.device("meta"):
        method = find_method(recipe.method_name)(norm, 8, recipe.method)
        method.set_num_samples(images.count)
    return check_settings(recipe, method, images)


def warned(recipe: Recipe, images: ImageSummary) -> dict[str, str]:
    return {finding.check: finding.sentence for finding in advise(recipe, images) if finding.verdict == "warning"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_warning_on_a_shipped_recipe(name: str) -> None:
    assert warned(load_recipe(name), IMAGENET) == {}
    if "cifar" in name:
        assert warned(load_recipe(name), CIFAR) == {}
    if load_recipe(name).data.path.startswith("builtin"):
        assert warned(load_recipe(name), FASHION) == {}


# Shipped recipe, what is set, data, and the one check that must warn.
CALLS: list[tuple[str, list[str], ImageSummary, str]] = [
    ("mocov2_r50", [], ImageSummary(40_000, 350, 400, False), "queue length"),
    ("mocov2_r50", ["method.queue_size=128"], IMAGENET, "queue length"),
    ("memory_bank_r50", [], ImageSummary(40_000, 350, 400, False), "queue length"),
    ("mocov2_r50", ["method.momentum=1.0"], IMAGENET, "momentum"),
    ("mocov2_r50", ["method.momentum=0.0"], IMAGENET, "momentum"),
    ("mocov2_r50", ["method.momentum=0.5"], IMAGENET, "momentum"),
    ("mocov1_small_cpu", ["method.momentum=0.999"], FASHION, "momentum"),
    ("mocov3_vits", ["method.momentum=0.99999"], IMAGENET, "momentum"),
    ("mocov2_r50", ["method.temperature=0.01"], IMAGENET, "temperature"),
    ("simclr_r50", ["method.temperature=5.0"], IMAGENET, "temperature"),
    ("mocov2_r50", ["optim.lr=0.3"], IMAGENET, "learning rate"),
    ("mocov2_r50", ["optim.lr=0.0"], IMAGENET, "learning rate"),
    ("mocov2_r50", ["optim.lr=0.003"], IMAGENET, "learning rate"),
    ("mocov3_vitb", ["optim.lr_rule=none"], IMAGENET, "learning rate"),
    ("mocov2_cifar10", ["optim.lr_rule=none"], IMAGENET, "learning rate"),
    ("swav_r50", ["train.batch_size=256", "method.queue_size=3840"], IMAGENET, "learning rate"),
    ("mocov1_small_cpu", ["optim.name=adamw", "optim.lr=0.1", "optim.weight_decay=0.1"], FASHION, "learning rate"),
    ("mocov2_r50", ["optim.weight_decay=0.1"], IMAGENET, "weight decay"),
    ("mocov3_vits", ["optim.weight_decay=1.0"], IMAGENET, "weight decay"),
    ("simclr_r50", ["train.batch_size=64"], IMAGENET, "batch size"),
    ("byol_r50", ["train.batch_size=128"], IMAGENET, "batch size"),
    ("mocov3_vits", ["train.batch_size=64"], IMAGENET, "batch size"),
    ("instdisc_r50", ["train.batch_size=16"], IMAGENET, "batch size"),
    ("mocov2_r50", ["method.bn_groups=64"], IMAGENET, "batch size"),
    ("swav_r50_200ep_b256", ["method.queue_size=0"], IMAGENET, "method options"),
    ("mocov1_r50", ["train.epochs=100"], IMAGENET, "schedule"),
    ("mocov3_vits", ["schedule.warmup_epochs=200"], IMAGENET, "schedule"),
    ("mocov3_vits", ["schedule.warmup_epochs=0"], IMAGENET, "schedule"),
    ("mocov1_small_cpu", ["train.epochs=2", "method.momentum=0.9"], FASHION, "schedule"),
    ("mocov3_continue", ["train.head_warmup_epochs=50"], IMAGENET, "schedule"),
    ("swav_r50_200ep_b256", ["method.freeze_prototypes_steps=900000"], IMAGENET, "method options"),
    ("swav_r50_200ep_b256", ["method.queue_start_epoch=200"], IMAGENET, "method options"),
    ("mocov2_r50", ["checkpoint.every_minutes=0"], IMAGENET, "saving"),
    ("mocov2_r50", [], ImageSummary(1_281_167, 350, 400, grey=True), "colour"),
    ("mocov1_small_cpu", ["views.jitter=[0.4,0.4,0.4,0.1]"], FASHION, "colour"),
    ("mocov3_vit_small_cpu", ["views.crop_scale=[0.05,1.0]"], FASHION, "crops"),
    ("mocov2_r50", ["views.crop_scale=[0.01,0.05]"], IMAGENET, "crops"),
    ("swav_r50", ["views.small_scale=[0.0001,0.05]"], IMAGENET, "crops"),
    ("mocov1_small_cpu", ["views.size=224"], FASHION, "view size"),
    ("mocov2_cifar10", ["views.blur_prob=0.5"], CIFAR, "blur"),
]


@pytest.mark.parametrize(("name", "words", "facts", "check"), CALLS, ids=lambda value: str(value)[:40])
def test_advice_is_given_where_it_is_due(name: str, words: list[str], facts: ImageSummary, check: str) -> None:
    assert set(warned(load_recipe(name, words), facts)) == {check}


@pytest.mark.parametrize(("name", "words", "facts", "check"), CALLS, ids=lambda value: str(value)[:40])
def test_following_the_advice_ends_the_warning(name: str, words: list[str], facts: ImageSummary, check: str) -> None:
    advised = Report(advise(load_recipe(name, words), facts)).settings()
    assert advised
    assert check not in warned(load_recipe(name, words + advised), facts)


def test_thresholds_are_where_the_sentences_say() -> None:
    for symmetric, epochs in (("false", "2.0 epochs"), ("true", "1.0 epochs")):
        words = ["method.queue_size=20000", f"method.symmetric={symmetric}"]
        assert epochs in warned(load_recipe("mocov1_small_cpu", words), FASHION)["queue length"]
    continued = load_recipe("mocov3_continue")
    assert continued.peak_lr == pytest.approx(1e-4)
    assert "learning rate" in warned(load_recipe("mocov3_vits", ["optim.lr=2.5e-5"]), IMAGENET)


def test_advice_on_the_batch_is_possible() -> None:
    few = ImageSummary(20, 64, 64, grey=False)
    small = ["train.batch_size=14", "method.bn_groups=2"]
    sentences = [
        warned(load_recipe("mocov2_r50", small), IMAGENET)["batch size"],
        warned(load_recipe("mocov2_r50", [*small, "method.queue_size=14"]), few)["batch size"],
        warned(load_recipe("mocov2_r50", ["train.batch_size=14", "method.bn_groups=1"]), few)["batch size"],
        warned(load_recipe("simclr_r50", ["train.batch_size=16"]), few)["batch size"],
    ]
    assert sentences[0].endswith("too few for batch statistics: set train.batch_size = 16")
    assert sentences[1].endswith("too few for batch statistics: set train.batch_size = 16")
    assert sentences[2] == "14 is small for any method; more images would allow a larger batch"
    assert sentences[3] == "16 is small for any method; more images would allow a larger batch"


# Method, options, images, batch, views: what the doctor says, or nothing.
SMALL_SETS: list[tuple[str, list[str], ImageSummary, str]] = [
    ("simclr", ["train.batch_size=64"], CIFAR, ""),
    ("byol", ["train.batch_size=32"], CIFAR, ""),
    ("moco_v2", ["train.batch_size=16", "method.queue_size=16"], ImageSummary(16, 64, 64, False), "more images would"),
    ("moco_v2", ["train.batch_size=32", "method.queue_size=32"], ImageSummary(32, 64, 64, False), ""),
    ("moco_v2", ["train.batch_size=32", "method.queue_size=4096"], ImageSummary(64, 64, 64, False), "queue_size = 32"),
    (
        "moco_v2",
        ["train.batch_size=32", "method.queue_size=256"],
        ImageSummary(600, 64, 64, False, Variety(32, 30, 0), copies=400, compared=600),
        "1.3 epochs of the 200 images",  # 256 keys of 200 different images
    ),
]


@pytest.mark.parametrize(("method", "words", "facts", "said"), SMALL_SETS, ids=lambda value: str(value)[:40])
def test_advice_on_small_sets(method: str, words: list[str], facts: ImageSummary, said: str) -> None:
    tables = small_recipe(method, "test_resnet", train={"epochs": 400, "batch_size": 32}).as_tables()
    found = warned(load_recipe(tables, words), facts)
    sentences = [found[check] for check in ("queue length", "batch size") if check in found]
    assert len(sentences) == bool(said)
    assert said in "".join(sentences)


def test_copies_are_mentioned() -> None:
    recipe = load_recipe("mocov2_cifar10")
    few, many = (replace(CIFAR, variety=Variety(32, 31, 0), copies=count, compared=5000) for count in (3, 2500))
    assert (
        "3 of 5000 images looked at are copies" in {each.check: each.sentence for each in advise(recipe, few)}["copies"]
    )
    assert "copies" not in warned(recipe, few)
    assert "2500 of 5000 images looked at are copies" in warned(recipe, many)["copies"]


@pytest.mark.parametrize(
    ("name", "views", "advice"),
    [
        ("vit_small_patch14_dinov2", {"size": 64}, {"views.size=70"}),  # 56 of 64: 1 - (56 / 64)^2 = 23%
        ("vit_small_patch14_dinov2", {"size": 98}, set()),
        ("vit_small_patch14_dinov2", {"size": 98, "local": {"count": 2, "size": 40}}, {"views.local.size=42"}),
        ("vit_small_patch16_224", {"size": 64}, set()),
        ("resnet18", {"size": 65}, set()),
    ],
)
def test_views_are_whole_patches(name: str, views: dict[str, Any], advice: set[str]) -> None:
    recipe = load_recipe(small_recipe("swav", name, views={"small_crops": 0}).as_tables(), {"views": views})
    with torch.device("meta"):
        method = find_method("swav")(create_backbone(recipe.backbone_config()), 8, recipe.method)
    report = Report([each for each in check_settings(recipe, method, CIFAR) if each.check == "patches"])
    assert set(report.settings()) == advice
    if views["size"] == 64 and advice:
        assert "23% of their pixels are never seen" in report.of("warning")[0].sentence


def test_advice_for_any_method_and_optimizer() -> None:
    tables: list[dict[str, Any]] = [{"optim": {"name": "lamb", "lr": 1e-2, "weight_decay": 0.1}}, {}]
    for name in ("moco_v3", "byol", "swav", "end_to_end", "instdisc"):
        for extra in tables:
            assert advise(small_recipe(name, "test_resnet", **extra), CIFAR)


def test_images_are_looked_at() -> None:
    facts = summarise_images(open_source(DataConfig(path="builtin:fashion_mnist", split="test")))
    assert facts == ImageSummary(2000, 28, 28, grey=True, variety=Variety(32, 32, 0), sides=(28, 28, 28))


def test_pixels_out_of_range() -> None:
    torch.manual_seed(0)
    sound = torch.randn(4, 3, 8, 8)
    assert check_pixels(sound).verdict == "ok"
    assert check_pixels(sound * 0.25 + 0.5).verdict == "ok"  # SimCLR leaves pixels in [0, 1]
    for broken in (sound - 500, sound * 100, sound * 0.001):
        assert check_pixels(broken).verdict == "warning"


def test_a_run_says_at_its_start_what_does_not_fit_its_data(
    capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path
) -> None:
    words = ["--data", str(class_folders), "--set", "train.batch_size=16", "--set", "train.max_steps=1"]
    small = ["--set", "backbone.name=test_resnet", "--set", "views.size=96", "--output", str(tmp_path / "run")]
    code, out, _ = run(capsys, "pretrain", "mocov2_r50", *words, *small, "--set", "data.workers=0")
    assert code == 0
    assert "WARNING: queue length: the queue holds 1638.4 epochs of the 40 images" in out  # 65 536 / 40
    advice = next(line for line in out.splitlines() if line.startswith("to follow the advice, add: "))
    assert {"method.queue_size=16", "method.bn_groups=2", "views.size=64"} <= set(advice.split())
