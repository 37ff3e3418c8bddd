"""Recipes: the papers' defaults, layers of settings, and every mistake named at once."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe, build_recipe, changes, find_recipe, load_recipe, shipped_recipes

BARE = {"method": {"name": "moco_v2"}, "backbone": {"name": "resnet50"}, "data": {"path": "photos"}}


def recipe_for(method: str, backbone: str) -> Recipe:
    return build_recipe({"method": {"name": method}, "backbone": {"name": backbone}, "data": {"path": "photos"}})


def test_defaults_are_the_papers() -> None:
    v1, v2 = recipe_for("moco_v1", "resnet50"), recipe_for("moco_v2", "resnet50")
    for recipe in (v1, v2):
        assert (recipe.optim.name, recipe.peak_lr, recipe.optim.weight_decay) == ("sgd", 0.03, 1e-4)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.schedule.per) == (200, 256, "epoch")
        assert recipe.backbone.zero_init_last is False
        assert recipe.method.model_dump()["queue_size"] == 65536
    assert v1.schedule.milestones == [120, 160]
    assert (v1.views.gray_first, v1.views.jitter, v1.views.blur_prob) == (True, (0.4, 0.4, 0.4, 0.4), 0.0)
    assert (v2.schedule.decay, v2.schedule.warmup_epochs) == ("cosine", 0.0)
    assert (v2.views.jitter, v2.views.blur_prob, v2.views.crop_scale) == ((0.4, 0.4, 0.4, 0.1), 0.5, (0.2, 1.0))


def test_v3_defaults_follow_the_backbone() -> None:
    resnet, vit = recipe_for("mocov3", "resnet50"), recipe_for("mocov3", "vit_base_patch16_224")
    assert (resnet.optim.name, resnet.peak_lr, resnet.optim.weight_decay) == ("lars", pytest.approx(9.6), 1e-6)
    assert resnet.method.model_dump(exclude_none=True) == {
        "dim": 256,
        "hidden_dim": 4096,
        "temperature": 1.0,
        "momentum": 0.99,
        "momentum_schedule": "cosine",
        "projector_layers": 2,
        "predictor_last_norm": False,
        "predictor": True,
        "head_norm": True,
    }
    assert (resnet.views.crop_scale, resnet.schedule.warmup_epochs) == ((0.2, 1.0), 10)
    assert (vit.optim.name, vit.peak_lr, vit.optim.weight_decay) == ("adamw", pytest.approx(2.4e-3), 0.1)
    assert (vit.method.model_dump()["temperature"], vit.views.crop_scale) == (0.2, (0.08, 1.0))
    assert (vit.backbone.pos_embed, vit.backbone.freeze_patch_embed, vit.backbone.init) == ("sincos2d", True, "moco_v3")
    swin = recipe_for("mocov3", "swin_tiny_patch4_window7_224")
    assert (swin.optim.name, swin.backbone.pos_embed, swin.backbone.freeze_patch_embed) == ("adamw", "timm", False)


def test_resolved_recipe_loads_back() -> None:
    for method, backbone in (("moco_v1", "resnet18"), ("moco_v3", "test_vit")):
        recipe = recipe_for(method, backbone)
        assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_overrides_win_and_keep_their_types() -> None:
    recipe = build_recipe(
        BARE,
        ["train.epochs=7", "data.path=other photos", "views.crop_scale=[0.5, 1.0]", "backbone.args.output_stride=8"],
    )
    assert (recipe.train.epochs, recipe.data.path, recipe.views.crop_scale) == (7, "other photos", (0.5, 1.0))
    assert recipe.backbone.args == {"output_stride": 8}
    with pytest.raises(UserError, match=r"write table\.key=value"):
        build_recipe(BARE, ["epochs=7"])


def test_another_optimizer_brings_its_own_rate() -> None:
    with pytest.raises(UserError, match=r"\[optim\] lr: missing"):
        build_recipe({**BARE, "optim": {"name": "lamb"}})


def test_continued_weights_keep_their_position_embedding() -> None:
    tables = {"method": {"name": "moco_v3"}, "data": {"path": "x"}}
    recipe = build_recipe({**tables, "backbone": {"name": "vit_small_patch16_224", "pretrained": True}})
    assert (recipe.backbone.pos_embed, recipe.backbone.init) == ("timm", "timm")


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"method": {"name": "moco_v4"}}, r"\[method\] name: unknown method 'moco_v4'; did you mean"),
        ({"backbone": {"name": "resnt50"}}, r"\[backbone\] name: timm has no model 'resnt50'; did you mean"),
        ({"method": {"name": "moco_v2", "temprature": 1}}, r"\[method\] temprature: unknown key; did you mean 'temper"),
        ({"trian": {"epochs": 1}}, r"\[trian\]: unknown table; did you mean 'train'"),
        ({"train": {"epochs": -1}}, r"\[train\] epochs: .* not -1"),
        ({"train": {"epochs": "many"}}, r"\[train\] epochs: .* not 'many'"),
        ({"optim": {"lr": float("nan")}}, r"\[optim\] lr: .*finite"),
        ({"views": {"policy": "moco_v9"}}, r"\[views\] policy: unknown policy 'moco_v9'; did you mean"),
        ({"views": {"crop_scale": [1.0, 0.2]}}, r"\[views\] crop_scale: must be two positive numbers"),
        ({"views": {"crop_scale": [0.5, 2]}}, r"\[views\] crop_scale: is a share"),
        ({"views": {"std": [0, 1, 1]}}, r"\[views\] std: must be positive"),
        ({"schedule": {"warmup_epochs": 900}}, r"\[schedule\] warmup_epochs: 900 epochs"),
        ({"backbone": {"name": "resnet50", "pretrained": "weights.pth"}}, r"pretrained: must be true, false, 'hf_hub:"),
        ({"monitor": {"every_epochs": 1}}, r"\[monitor\].*needs data"),
        ({"data": {"path": "x", "workers": -1}}, r"\[data\] workers"),
        ({"data": {"path": ""}}, r"\[data\] path"),
        ({"train": 3}, r"train: must be a table"),
        ({"backbone": {"name": "resnet50", "img_size": 64}}, r"\[backbone\] img_size: 'resnet50' takes images of any"),
        ({"method": {"name": 3}}, r"\[method\] name: must be a string, not 3"),
    ],
)
def test_mistakes_are_named(tables: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_recipe({**BARE, **tables}, name="my.toml")
    assert str(caught.value).startswith("my.toml ")


def test_all_mistakes_at_once() -> None:
    with pytest.raises(UserError) as caught:
        build_recipe({**BARE, "train": {"epochs": 0, "batchsize": 4}, "optim": {"lr": -1}}, name="my.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("did you mean 'batch_size'" in line for line in lines)


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'mocov3_vitb'"):
        load_recipe("mocov3_vitbb")
    broken = tmp_path / "broken.toml"
    broken.write_text("[method\nname = 3")
    with pytest.raises(UserError, match="not a readable TOML file"):
        load_recipe(broken)


def test_a_recipe_saved_on_windows(tmp_path: Path) -> None:
    file, text = tmp_path / "mine.toml", find_recipe("quickstart").read_text(encoding="utf-8")
    for mark in ("", "\ufeff"):
        file.write_bytes((mark + text.replace("\n", "\r\n")).encode())
        assert load_recipe(file) == load_recipe("quickstart")
    file.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"mine\.toml: is encoded in UTF-16, but TOML must be UTF-8"):
        load_recipe(file)


PUBLISHED = {
    "mocov1_r50": ("moco_v1", "resnet50", 200, 256, 60.6),
    "mocov2_r50": ("moco_v2", "resnet50", 200, 256, 67.5),
    "mocov2_r50_800ep": ("moco_v2", "resnet50", 800, 256, 71.1),
    "mocov3_r50": ("moco_v3", "resnet50", 100, 4096, 68.9),
    "mocov3_r50_300ep": ("moco_v3", "resnet50", 300, 4096, 72.8),
    "mocov3_r50_1000ep": ("moco_v3", "resnet50", 1000, 4096, 74.6),
    "mocov3_vits": ("moco_v3", "vit_small_patch16_224", 300, 4096, 73.2),
    "mocov3_vitb": ("moco_v3", "vit_base_patch16_224", 300, 4096, 76.7),
    "mocov3_vitl": ("moco_v3", "vit_large_patch16_224", 300, 4096, 77.6),
    "simclr_r50": ("simclr", "resnet50", 100, 4096, 64.5),
    "byol_r50": ("byol", "resnet50", 1000, 4096, 74.3),
    "byol_r50_300ep": ("byol", "resnet50", 300, 4096, 72.5),
    "swav_r50": ("swav", "resnet50", 800, 4096, 75.3),
    "memory_bank_r50": ("memory_bank", "resnet50", 200, 256, 58.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipes_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    method, backbone, epochs, batch, top1 = PUBLISHED[name]
    assert (recipe.method_name, recipe.backbone.name) == (method, backbone)
    assert (recipe.train.epochs, recipe.train.batch_size) == (epochs, batch)
    assert recipe.reference["linear_top1"] == top1
    plain = recipe_for(method, backbone)
    differing = {line.split(":")[0] for line in changes(plain.as_tables(), recipe.as_tables())}
    allowed = {
        *("data.path", "train.epochs", "train.precision", "optim.lr", "optim.weight_decay", "method.momentum"),
        "backbone.args",
    }
    assert {key for key in differing if not key.startswith("reference.")} <= allowed
    assert load_recipe("mocov3_vits").backbone.args == {"num_heads": 12}


def test_every_shipped_recipe_resolves_and_says_who_measured() -> None:
    names = shipped_recipes()
    assert {*PUBLISHED, "quickstart", "mocov2_cifar10", "mocov3_vit_small_cpu", "mocov1_small_cpu"} <= names.keys()
    for name, file in names.items():
        load_recipe(name)
        comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert any("measured" in line.lower() for line in comment), name


def test_long_recipes_of_v3_r50() -> None:
    assert load_recipe("mocov3_r50_300ep").optim.lr == 0.3
    longest = load_recipe("mocov3_r50_1000ep")
    assert (longest.optim.lr, longest.optim.weight_decay) == (0.3, 1.5e-6)
    assert longest.method.model_dump()["momentum"] == 0.996


def test_cifar_recipe_is_the_notebooks() -> None:
    recipe = load_recipe("mocov2_cifar10")
    assert recipe.method.model_dump(exclude_none=True) == {
        **{"dim": 128, "queue_size": 4096, "temperature": 0.1, "momentum": 0.99, "bn_groups": 8},
        "momentum_schedule": "constant",
        "shuffle": True,
        "symmetric": False,
    }
    assert recipe.method_name == "moco_v1"  # the notebook has v1's linear head
    assert (recipe.backbone.name, recipe.backbone.small_stem) == ("resnet18", True)
    assert (recipe.train.batch_size, recipe.peak_lr, recipe.optim.weight_decay) == (512, 0.06, 5e-4)
    assert recipe.reference["knn_by_epoch"]["200"] == 82.58


def test_an_unknown_method_does_not_hide_other_mistakes() -> None:
    tables: dict[str, Any] = {
        "method": {"name": "mocov4"},
        "backbone": {"name": "resnet51x"},
        "data": {"path": "x"},
        "train": {"epochz": 3},
    }
    with pytest.raises(UserError) as caught:
        build_recipe(tables, name="r.toml")
    sentences = str(caught.value).splitlines()
    assert ["mocov4" in sentences[0], "resnet51x" in sentences[1], "epochz" in sentences[2]] == [True] * 3
    assert len(sentences) == 3


def test_a_monitor_that_is_not_on_the_images_trained_on_is_said() -> None:
    (said,) = load_recipe("quickstart", ['data.path="my photos"']).remarks
    assert "scores 'builtin:fashion_mnist', not the images trained on; --set 'monitor.data=my photos'" in said
    stated = ["data.path=photos", "monitor.data=builtin:fashion_mnist"]
    assert load_recipe("quickstart", stated).remarks == ()
    assert load_recipe("quickstart", ["data.path=photos", "monitor.every_epochs=0"]).remarks == ()


def test_monitor_data_alone_measures_about_ten_times() -> None:
    recipe = load_recipe("mocov2_r50", ["data.path=photos", "monitor.data=labelled"])
    assert recipe.monitor.every_epochs == 20  # of 200 epochs
    assert recipe.remarks == (
        "[monitor] data without every_epochs: kNN every 20 epochs; --set monitor.every_epochs=0 turns it off",
    )
    assert build_recipe(recipe.as_tables()).remarks == ()
    assert load_recipe("mocov2_r50", ["data.path=photos", "monitor.data=x", "monitor.every_epochs=0"]).remarks == ()
    assert load_recipe("mocov2_r50", ["data.path=photos"]).as_tables()["monitor"]["every_epochs"] == 0
