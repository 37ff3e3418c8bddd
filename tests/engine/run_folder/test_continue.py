"""Continuing from weights: they arrive whole in student and teacher, and wait while fresh heads learn."""

from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from safetensors.torch import load_file

import sslkit
from sslkit.engine.setup import build_method
from sslkit.errors import UserError
from sslkit.publish import export_encoder
from sslkit.recipe.resolve import build_recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continue")
    sslkit.train(small_recipe("moco_v3", "test_vit"), folder / "run")
    export_encoder(str(folder / "run"), str(folder / "encoder"))
    return folder / "encoder"


@pytest.mark.parametrize("name", ["moco_v3", "moco_v2", "simclr"])
def test_student_and_teacher_start_from_the_weights(name: str, exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    method = build_method(small_recipe(name, "test_vit", backbone={"pretrained": f"local-dir:{exported}"}))
    for module in [method.backbone, *([method.teacher_backbone.module] if name != "simclr" else [])]:
        state = module.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_the_backbone_waits_for_the_heads(exported: Path, tmp_path: Path) -> None:
    """Not even weight decay moves it; afterwards it learns."""
    weights = load_file(exported / "model.safetensors")
    changed = {}
    for max_steps in (3, 4):
        recipe = small_recipe(
            "moco_v3",
            "test_vit",
            backbone={"pretrained": f"local-dir:{exported}"},
            train={"head_warmup_epochs": 3 / (2000 // 32), "max_steps": max_steps},
            optim={"name": "adamw", "lr": 0.01, "weight_decay": 0.5},
        )
        run = sslkit.train(recipe, tmp_path / str(max_steps))
        state = load_file(run.folder / f"checkpoints/step-{max_steps:08d}/model.safetensors")
        changed[max_steps] = [key for key, value in weights.items() if not torch.equal(state[f"backbone.{key}"], value)]
        start = build_method(recipe).projector.state_dict()
        assert not torch.equal(state["projector.0.weight"], start["0.weight"])
    assert changed[3] == []
    assert "blocks.0.attn.qkv.weight" in changed[4]


def test_weights_of_timm_bring_their_normalisation() -> None:
    tables = {"method": {"name": "moco_v3"}, "data": {"path": "x"}}
    name = "vit_small_patch16_224.augreg_in21k"
    scratch = build_recipe({**tables, "backbone": {"name": name}})
    continued = build_recipe({**tables, "backbone": {"name": name, "pretrained": True}})
    assert (scratch.views.mean, continued.views.mean) == ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
    given = build_recipe({**tables, "backbone": {"name": name, "pretrained": True}, "views": {"mean": [0.1, 0.2, 0.3]}})
    assert given.views.mean == (0.1, 0.2, 0.3)


def test_another_architecture_is_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="holds a 'test_vit'; name that instead"):
        build_method(small_recipe("moco_v3", "test_vit2", backbone={"pretrained": f"local-dir:{exported}"}))


def test_a_run_says_which_tensors_it_took(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(
        "moco_v3", "test_vit", backbone={"pretrained": f"local-dir:{exported}"}, train={"max_steps": 1}
    )
    sslkit.train(recipe, tmp_path / "run")
    count = len(load_file(exported / "model.safetensors"))
    said = f"weights local-dir:{exported}: {count} tensors taken; fresh: projector, predictor; the teacher starts as a"
    assert said in capsys.readouterr().out


def test_a_run_without_knn_keeps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of earlier versions have data but every_epochs = 0 in their recipes, which stated neither."""
    monitor = {"data": "builtin:fashion_mnist", "max_train": 50, "diagnose_every": 0}
    sslkit.train(small_recipe(monitor={**monitor, "every_epochs": 0}, train={"max_steps": 1}), tmp_path / "run")
    run = sslkit.train(small_recipe(monitor=monitor, train={"max_steps": 2}), tmp_path / "run")
    assert (run.step, run.results()) == (2, [])
    assert "this run started with [monitor] every_epochs = 0, without kNN, and keeps it" in capsys.readouterr().out
    new = sslkit.train(small_recipe(monitor=monitor, train={"max_steps": 1}), tmp_path / "new")
    assert [row["step"] for row in new.results()] == [1]
