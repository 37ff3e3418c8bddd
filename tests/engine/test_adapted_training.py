"""[adapt]: what trains, at which rate, and the anchor, for every method, whole and sliced, killed and resumed."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_recipe
from launching import finish, pretrain, start
from safetensors.torch import load_file
from test_step import BATCH, CPU, accelerator, assert_same, batch_of, sliced
from torch import Tensor, nn
from torch.nn.functional import interpolate

import sslkit
from sslkit.engine.gradient_cache import whole_batch_step
from sslkit.engine.optim import make_optimizer
from sslkit.engine.setup import build_method
from sslkit.engine.step import seed_dropout
from sslkit.errors import UserError
from sslkit.methods import METHODS, Method
from sslkit.parts.adaptation.anchor import Anchor
from sslkit.recipe.resolve import Recipe, build_recipe, load_recipe

MODELS = ("test_vit", "test_resnet", "test_efficientnet")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of encoders whose BatchNorm statistics differ from those of fresh ones."""
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(5)
        model = timm.create_model(name, num_classes=0)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0.0, 0.2)
                layer.running_var.uniform_(0.5, 2.0)
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        found[name] = f"local-dir:{folder}"
    return found


def adapted(
    weights: dict[str, str], name: str, model: str, /, adapt: dict[str, Any], **tables: dict[str, Any]
) -> Recipe:
    return small_recipe(name, model, backbone={"pretrained": weights[model]}, adapt=adapt, **tables)


def built(recipe: Recipe) -> Method:
    torch.manual_seed(0)
    return build_method(recipe, num_samples=20).double()


def whole(method: Method) -> Any:
    seed_dropout(0, CPU)
    return whole_batch_step(accelerator(), method, batch_of(method))


def trained(module: nn.Module) -> set[str]:
    return {name for name, param in module.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("size", [0, 48])
@pytest.mark.parametrize("name", ["moco_v2", "swav", "end_to_end", "instdisc"])
def test_the_anchor_adds_the_distance_from_the_start(name: str, size: int, weights: dict[str, str]) -> None:
    """Against the plain formula, on a student that has moved away from its start."""
    train = {"batch_size": BATCH}
    plain = built(adapted(weights, name, "test_resnet", {"freeze_batch_norm": True}, train=train)).train()
    adapt = {"freeze_batch_norm": True, "anchor": 0.7, "anchor_size": size}
    method = built(adapted(weights, name, "test_resnet", adapt, train=train)).train()
    for one in (plain, method):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in one.backbone.parameters():
                param += 0.05 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    first = timm.create_model(weights["test_resnet"], pretrained=True).double().eval()
    moved = timm.create_model("test_resnet", num_classes=0).double().eval()
    moved.load_state_dict(method.backbone.state_dict())
    views = [view.float().double() for view in batch_of(method).views]
    views = {"moco_v2": views[:1], "instdisc": views[:1]}.get(name, views)
    terms = []
    for view in views:
        large = interpolate(view, (size, size), mode="bicubic", align_corners=False) if size else view
        a, b = moved(view), first(large)
        terms.append(1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    expected = 0.7 * torch.cat(terms).mean().item()
    assert expected > 1e-4
    assert whole(method).loss.item() - whole(plain).loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_an_anchored_step_in_slices_is_that_of_the_whole_batch(name: str, weights: dict[str, str]) -> None:
    """With BatchNorm's statistics kept, slices of a ResNet are exact too."""
    adapt = {"anchor": 0.5, "anchor_size": 40, "freeze_batch_norm": True}
    recipe = adapted(
        weights,
        name,
        "test_resnet",
        adapt,
        train={"batch_size": BATCH},
        method={"bn_groups": 1} if name in ("moco_v1", "moco_v2", "end_to_end") else {},
    )
    one, other = built(recipe).train(), built(recipe).train()
    for method in (one, other):
        with torch.no_grad():
            next(method.backbone.parameters()).mul_(1.5)
    assert_same(sliced(one, 4), whole(other), one, other)
    assert any(param.grad is not None for param in one.backbone.parameters())


@pytest.mark.parametrize("name", ["moco_v2", "byol"])
def test_kept_statistics_stay_those_of_the_start(name: str, weights: dict[str, str], tmp_path: Path) -> None:
    recipe = adapted(weights, name, "test_resnet", {"freeze_batch_norm": True})
    run = sslkit.train(recipe, tmp_path / "run")
    state = load_file(run.folder / f"checkpoints/step-{run.step:08d}/model.safetensors")
    begun = load_file(Path(weights["test_resnet"].removeprefix("local-dir:")) / "model.safetensors")
    for prefix in ("backbone", "teacher_backbone.module"):
        changed = {key for key, value in begun.items() if not torch.equal(state[f"{prefix}.{key}"], value)}
        assert any(key.endswith("conv1.weight") for key in changed)
        assert not {key for key in changed if "running" in key or "num_batches" in key}


@pytest.mark.parametrize(
    ("model", "count", "first"),
    [("test_vit", 2, "blocks.4."), ("test_resnet", 1, "layer4."), ("test_efficientnet", 1, "blocks.4.")],
)
def test_last_blocks(model: str, count: int, first: str, weights: dict[str, str]) -> None:
    method = build_method(adapted(weights, "moco_v3", model, {"last_blocks": count}))
    names = [name for name, _ in method.backbone.named_parameters()]
    begin = next(index for index, name in enumerate(names) if name.startswith(first))
    assert trained(method.backbone) == set(names[begin:]) & trained(timm.create_model(model, num_classes=0))
    assert trained(method) > {f"backbone.{name}" for name in names[begin:]}  # heads too


def test_too_many_blocks(weights: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"last_blocks: 99, but the model has \d+ blocks"):
        build_method(adapted(weights, "moco_v3", "test_vit", {"last_blocks": 99}))


def test_layer_decay_is_timms(weights: dict[str, str]) -> None:
    """Each parameter's multiplier is the lr_scale of timm's own groups."""
    for model in MODELS:
        method = build_method(adapted(weights, "byol", model, {"layer_decay": 0.6}))
        groups = timm.optim.param_groups_layer_decay(method.backbone, layer_decay=0.6)
        expected = {id(param): group["lr_scale"] for group in groups for param in group["params"]}
        recipe = adapted(weights, "byol", model, {"layer_decay": 0.6})
        found = {id(p): g["lr_multiplier"] for g in make_optimizer(recipe, method).param_groups for p in g["params"]}
        own = {id(param) for param in method.backbone.parameters()}
        assert {key: pytest.approx(expected[key]) for key in own} == {key: found[key] for key in own}
        assert {found[key] for key in found.keys() - own} == {1.0}
        assert len(set(found.values())) > 4


@pytest.mark.parametrize("micro_batch", [0, pytest.param(16, marks=pytest.mark.full)])
def test_a_stopped_run_continues_bit_for_bit(micro_batch: int, weights: dict[str, str], tmp_path: Path) -> None:
    adapt = {"anchor": 0.5, "anchor_size": 48, "layer_decay": 0.7, "last_blocks": 2}
    ends = []
    for name, stops in (("whole", (6,)), ("resumed", (3, 6))):
        for stop in stops:
            train = {"max_steps": stop, "micro_batch": micro_batch}
            run = sslkit.train(adapted(weights, "moco_v3", "test_vit", adapt, train=train), tmp_path / name)
        ends.append(load_file(run.folder / "checkpoints/step-00000006/model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    begun = load_file(Path(weights["test_vit"].removeprefix("local-dir:")) / "model.safetensors")
    assert torch.equal(ends[0]["anchor_backbone.module.norm.weight"], begun["norm.weight"])
    assert not torch.equal(ends[0]["backbone.norm.weight"], begun["norm.weight"])


@functools.cache
def _recipe_text() -> dict[str, Any]:
    return small_recipe("moco_v3", "test_vit").as_tables()


def test_a_recipe_without_the_table_is_as_before(tmp_path: Path) -> None:
    assert "adapt" not in _recipe_text()
    stated = build_recipe({**_recipe_text(), "adapt": {"layer_decay": 1.0}})
    assert stated.to_toml() == small_recipe("moco_v3", "test_vit").to_toml()
    changed = build_recipe({**_recipe_text(), "adapt": {"layer_decay": 0.5}})
    (tmp_path / "r.toml").write_text(changed.to_toml())
    assert load_recipe(tmp_path / "r.toml") == changed


@pytest.mark.parametrize(
    ("adapt", "words"),
    [
        ({"last_blocks": 1, "lora_rank": 2}, "set one of them to 0"),
        ({"anchor_size": 64}, "anchor_size needs the anchor"),
        ({"anchor": 1.0}, "there is nothing to keep of random weights"),
        ({"anker": 1.0}, "unknown key"),
    ],
)
def test_mistakes(adapt: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        small_recipe("moco_v3", "test_vit", adapt=adapt)


def test_an_anchor_of_a_wrong_size(weights: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"\[adapt\] anchor_size: 40 does not fit the backbone"):
        build_method(adapted(weights, "moco_v3", "test_vit", {"anchor": 1.0, "anchor_size": 40}))


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return out


def test_lora_trains_little_and_is_merged(weights: dict[str, str], tmp_path: Path) -> None:
    """The encoder folder is plain timm and gives the features of the run's student."""
    pytest.importorskip("peft")
    recipe = adapted(
        weights, "simclr", "test_vit", {"lora_rank": 2}, optim={"name": "adamw", "lr": 0.05, "weight_decay": 0.0}
    )
    run = sslkit.train(recipe, tmp_path / "run")
    method = build_method(recipe)
    assert all("lora_" in name for name in trained(method.backbone))
    assert len(trained(method.backbone)) == 2 * 4 * 6  # A and B of qkv, proj, fc1, fc2 in each block
    method.load_state_dict(load_file(run.folder / f"checkpoints/step-{run.step:08d}/model.safetensors"))
    merged = timm.create_model(f"local-dir:{run.folder / 'encoder'}", pretrained=True)
    torch.testing.assert_close(features(merged), features(method.backbone), rtol=1e-4, atol=1e-5)
    first = timm.create_model(weights["test_vit"], pretrained=True, img_size=32)
    assert not torch.allclose(features(merged), features(first), atol=1e-2)
    assert sslkit.train(recipe, tmp_path / "run").step == run.step  # its checkpoint is read again


def test_lora_needs_projections(weights: dict[str, str]) -> None:
    with pytest.raises(UserError, match="no linear layers of attention or MLP"):
        build_method(adapted(weights, "simclr", "test_resnet", {"lora_rank": 2}))


def test_the_anchor_keeps_no_gradient_and_no_training_mode(weights: dict[str, str]) -> None:
    method = build_method(adapted(weights, "moco_v3", "test_resnet", {"anchor": 1.0})).train()
    anchor = method.get_submodule("anchor_backbone")
    assert isinstance(anchor, Anchor)
    assert not trained(anchor)
    assert not any(module.training for module in anchor.module.modules())
    assert method.backbone.training


@pytest.mark.full
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_two_processes_train_as_one(micro_batch: int, weights: dict[str, str], tmp_path: Path) -> None:
    """The anchor, kept BatchNorm statistics and rates by layer: the same losses and weights."""
    adapt = {"anchor": 0.5, "anchor_size": 40, "freeze_batch_norm": True, "layer_decay": 0.7}
    tables = {
        "train": {"max_steps": 4, "batch_size": 16, "micro_batch": micro_batch, "log_every": 1},
        "method": {"bn_groups": 1, "queue_size": 96, "dim": 16},
        "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-4},
    }
    recipe = adapted(weights, "moco_v2", "test_resnet", adapt, **tables)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    alone = sslkit.train(recipe, tmp_path / "one")
    process = start(pretrain(tmp_path / "recipe.toml", tmp_path / "two"), processes=2)
    printed = finish(process)
    assert process.returncode == 0, printed[-3000:]
    rows = sslkit.Run(tmp_path / "two", 4).metrics()
    for field in ("loss", "anchor"):
        assert [row[field] for row in rows] == pytest.approx([row[field] for row in alone.metrics()], rel=1e-4)
    one, two = (load_file(tmp_path / name / "checkpoints/step-00000004/model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_lora_without_peft_says_what_to_install(weights: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora_rank: needs peft .*pip install peft"):
        build_method(adapted(weights, "simclr", "test_vit", {"lora_rank": 2}))
