"""Run folders with matching checksums and invalid content: one sentence, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli_error, small_recipe
from safetensors.torch import load_file, save_file
from tampering import contents, resign, rewrite
from torch import Tensor

import sslkit
from sslkit.engine.checkpoint.format import flatten_optimizer, newest_checkpoint, read_checkpoint, restore
from sslkit.engine.checkpoint.validation import SLOTS
from sslkit.engine.optim import make_optimizer
from sslkit.engine.setup import build_method
from sslkit.errors import UserError

VIT = {"name": "test_vit", "img_size": 32, "args": {"num_heads": 2}}
STEP = "checkpoints/step-00000002"
DEEP = 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with AdamW, which has the most state."""
    folder = tmp_path_factory.mktemp("good") / "run"
    optim = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1}
    recipe = small_recipe("moco_v2", "test_vit", train={"max_steps": 2}, backbone=VIT, optim=optim)
    sslkit.train(recipe, folder)
    return folder


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def refused(run: Path, *more: str) -> str:
    """The message when the run is continued; the run must not change."""
    recipe = shutil.copy(run / "recipe.toml", run.parent / "recipe.toml") if not more else more[0]
    before = contents(run)
    error = cli_error(["pretrain", str(recipe), "--output", str(run), "--set", "train.max_steps=3"])
    assert contents(run) == before
    assert len(error) < 2000
    return error


COURSES: list[Any] = [
    *("x", [1], None, 7, {"evil": 1}, {"losses": 5}, {"losses": ["a"]}, {"losses": [1.0, None]}, {"losses": {}}),
    *({"losses": [float("nan")]}, {"losses": [[1.0]]}, {"losses": [True]}),
    *({name: value} for name in ("rewinds", "skipped") for value in (2**40, -1, 1.5, "1", True, None, 10**400)),
    *({"lr_factor": value} for value in ("big", 1e30, -0.5, 0, float("inf"), float("nan"), None, [1.0], 10**400)),
    *({"__class__": 1}, {"maxlen": 3}),
]


@pytest.mark.parametrize("course", COURSES, ids=lambda course: repr(course)[:40])
def test_a_course_that_no_run_took(run: Path, course: Any) -> None:
    rewrite(run / STEP / "state.json", lambda state: state | {"course": course})
    resign(run / STEP)
    with pytest.raises(UserError, match=r"state\.json: .*: course ") as caught:
        read_checkpoint(run / STEP)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_course_of_an_earlier_version_and_a_troubled_one_are_read(run: Path) -> None:
    troubled = {"skipped": 2, "rewinds": 3, "lr_factor": 0.125, "losses": [1, 2.5]}
    for state in ({"course": troubled}, {"course": {}}, {}):
        rewrite(run / STEP / "state.json", lambda now, state=state: {**without(now, "course"), **state})
        resign(run / STEP)
        assert read_checkpoint(run / STEP).step == 2


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 1}
SCALERS: list[Any] = [
    *(None, "x", [], [1], 3, {"scale": 1.0}, SCALER | {"evil": 1}, without(SCALER, "scale")),
    *(SCALER | {"scale": value} for value in ("x", None, [1], -1.0, 0, 1e300, float("nan"), True, 10**400)),
    *(SCALER | {"growth_interval": value} for value in (0, -1, 1.5, "x", 10**30)),
    *(SCALER | {"_growth_tracker": value} for value in (-1, "x", 2**60)),
]


@pytest.mark.parametrize("scaler", SCALERS, ids=lambda scaler: repr(scaler)[:60])
def test_a_loss_scale_that_is_none(run: Path, scaler: Any) -> None:
    rewrite(run / STEP / "state.json", lambda state: state | {"scaler": scaler})
    resign(run / STEP)
    with pytest.raises(UserError, match=r"state\.json: .*: scaler "):
        read_checkpoint(run / STEP)


def test_a_loss_scale_of_pytorch_is_read(run: Path) -> None:
    scale = torch.amp.GradScaler("cpu")
    scale.scale(torch.ones(()))
    for scaler in (SCALER, scale.state_dict(), {}):
        rewrite(run / STEP / "state.json", lambda state, scaler=scaler: state | {"scaler": scaler})
        resign(run / STEP)
        scale.load_state_dict(read_checkpoint(run / STEP).state["scaler"] or SCALER)


STATES = {
    "course": {"course": {"lr_factor": 1e30}},
    "scaler": {"scaler": {"scale": "x"}},
    "a list for a number": {"optimizer": {"a": {"step": [1]}}},
    "numbers of nothing": {"optimizer": {"a": {"momentum": 3}}},
    "parameters that are none": {"optimizer": {"nobody": {"step": 3}}},
    "half of what is remembered": {"optimizer": {"backbone.norm.weight": {"step": 3}}},
    "a step that is another": {"step": 60},
}


@pytest.mark.parametrize("case", STATES)
def test_the_door_says_it_in_one_sentence(run: Path, case: str) -> None:
    rewrite(run / STEP / "state.json", lambda state: state | STATES[case])
    tensors = load_file(run / STEP / "optimizer.safetensors")
    for slot in ("exp_avg", "exp_avg_sq", "step"):
        del tensors[f"backbone.norm.weight/{slot}"]
    save_file(tensors, run / STEP / "optimizer.safetensors")
    resign(run / STEP)
    error = refused(run)
    assert "step-00000002" in error or "the checkpoint's optimizer state has" in error


def test_the_next_older_checkpoint_is_taken_for_one_that_lies(run: Path) -> None:
    shutil.copytree(run / STEP, run / "checkpoints" / "step-00000060")
    found, complaints = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert "its state.json is of step 2, but" in complaints[0]


ONE = "backbone.norm.weight"
OPTIMIZERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "parameters of a group": lambda now: now | {"param_groups.0/params": torch.zeros(3)},
    "a rate of a group": lambda now: now | {"param_groups.0/lr": torch.zeros(3)},
    "a rate of one number": lambda now: now | {"param_groups.0/lr": torch.tensor(1e30)},
    "steps of a group": lambda now: now | {"param_groups.0/step": torch.zeros(3)},
    "a group that is none": lambda now: now | {"param_groups.7/step": torch.tensor(1.0)},
    "a group of a word": lambda now: now | {"param_groups.x/step": torch.tensor(1.0)},
    "an unknown parameter": lambda now: now | {"nobody/exp_avg": torch.zeros(3)},
    "an unknown slot": lambda now: now | {f"{ONE}/evil": torch.zeros(3)},
    "a name without slot": lambda now: now | {"evil": torch.zeros(3)},
    "no name": lambda now: now | {"": torch.zeros(3)},
    "another optimizer's": lambda now: now | {f"{ONE}/momentum_buffer": torch.zeros_like(now[f"{ONE}/exp_avg"])},
    "half": lambda now: without(now, f"{ONE}/exp_avg_sq"),
    "one number": lambda now: now | {f"{ONE}/exp_avg": torch.tensor(1.0)},
    "whole numbers": lambda now: now | {f"{ONE}/exp_avg": now[f"{ONE}/exp_avg"].long()},
    "eight bits": lambda now: now | {f"{ONE}/exp_avg": now[f"{ONE}/exp_avg"].to(torch.float8_e4m3fn)},
    "a step before the first": lambda now: now | {f"{ONE}/step": torch.tensor(-1.0)},
    "a step that is no number": lambda now: now | {f"{ONE}/step": torch.tensor(float("nan"))},
    "a step without end": lambda now: now | {f"{ONE}/step": torch.tensor(float("inf"))},
    "several steps": lambda now: now | {f"{ONE}/step": torch.ones(2)},
    "the teacher's": lambda now: now | {"teacher_backbone.norm.weight/exp_avg": torch.zeros(3)},
}


@pytest.mark.full
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_that_is_none(run: Path, case: str) -> None:
    file = run / STEP / "optimizer.safetensors"
    recipe = sslkit.load_recipe(run / "recipe.toml")
    method = build_method(recipe, 100)
    optimizer = make_optimizer(recipe, method)
    restore(read_checkpoint(run / STEP), method, optimizer)
    save_file(dict(OPTIMIZERS[case](load_file(file))), file)
    resign(run / STEP)
    checkpoint = read_checkpoint(run / STEP)
    with pytest.raises(UserError, match="the checkpoint's ") as caught:
        restore(checkpoint, method, make_optimizer(recipe, method))
    assert "\n" not in str(caught.value)
    if case in ("parameters of a group", "half"):
        assert "the checkpoint's" in refused(run)


@pytest.mark.parametrize("name", ["sgd", "lars", "lars_simclr", "larc", "adamw", "lamb"])
def test_what_every_optimizer_remembers_is_restored(name: str) -> None:
    recipe = small_recipe("moco_v3", "test_vit", backbone=VIT, optim={"name": name, "lr": 0.1, "weight_decay": 0.5})
    method = build_method(recipe)
    optimizer = make_optimizer(recipe, method)
    for param in method.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    tensors, scalars = flatten_optimizer(method, optimizer)
    assert {key.rpartition("/")[2] for key in tensors} >= set(SLOTS[type(optimizer).__name__])
    state = {"step": 1, "recipe": {}, "optimizer": scalars}
    from_disk = {key: value.clone() for key, value in tensors.items()}
    twin = make_optimizer(recipe, method)
    restore(sslkit.engine.checkpoint.format.Checkpoint(1, method.state_dict(), from_disk, state), method, twin)
    again, _ = flatten_optimizer(method, twin)
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert again.keys() == tensors.keys()


@pytest.mark.parametrize("value", [-1, -(2**63), 2**62])
def test_a_place_in_the_queue_that_is_none(run: Path, value: int) -> None:
    weights = load_file(run / STEP / "model.safetensors")
    [name] = [name for name in weights if name.endswith("pointer")]
    save_file(weights | {name: torch.tensor(value)}, run / STEP / "model.safetensors")
    resign(run / STEP)
    assert "must be counts, from 0 to" in refused(run)


DATA = ["[" * DEEP, "{}", "[]", "null", "7", '"x"', '{"images": "2000"}', '{"images": 1e999, "names_sha256": ""}',
        '{"images": true, "names_sha256": "x"}', '{"images": 3, "names_sha256": 7}', "9" * 5000, "\xff",
        '{"images": [1], "names_sha256": "x"}', " " * 20_000 + "{}"]  # fmt: skip


@pytest.mark.parametrize("text", DATA, ids=lambda text: text[:20])
def test_a_list_of_images_that_is_none(run: Path, text: str) -> None:
    (run / "data.json").write_text(text, encoding="latin-1")
    assert "data.json: not readable" in refused(run)


RECIPES = {
    "deep lists": "[reference]\nx = " + "[" * 5000 + "]" * 5000,
    "deep tables": "[reference" + ".a" * 5000 + "]\nx = 1",
    "deep inline tables": "[reference]\nx = " + "{a=" * 5000 + "1" + "}" * 5000,
    "tables that are none": "method = 3\nbackbone = []\ndata = 'x'\nviews = 1.0\noptim = true\n",
    "no tables": "",
    "long words": f"[method]\nname = '{'x' * 900_000}'",
    "many words": "[views]\n" + "".join(f"k{index} = 1\n" for index in range(9000)),
    "a date": "[method]\nname = 1979-05-27T07:32:00Z",
    "no text": "\xff\xfe",
    "a megabyte": "#" * 2_000_000,
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_runs_recipe_that_is_none(run: Path, case: str) -> None:
    recipe = str(shutil.copy(run / "recipe.toml", run.parent / "recipe.toml"))
    (run / "recipe.toml").write_text(RECIPES[case], encoding="latin-1")
    assert str(run) in refused(run, recipe)


@pytest.mark.parametrize(
    "recipe", [{"method": 3}, {"method": {"name": [[[[[[[[[[1]]]]]]]]]]}}, {"optim": {"x": 2**70}}]
)
def test_a_recipe_in_a_checkpoint_that_is_none(run: Path, recipe: dict[str, Any]) -> None:
    own = str(shutil.copy(run / "recipe.toml", run.parent / "recipe.toml"))
    rewrite(run / STEP / "state.json", lambda state: state | {"recipe": recipe})
    resign(run / STEP)
    error = cli_error(["pretrain", own, "--output", str(run.parent / "new"), "--resume", str(run / STEP)])
    assert "--resume" in error
    assert len(error) < 5000
    assert not (run.parent / "new").exists()


ROWS = [b'{"step": 1e999}\n{"step": 2, "evaluation": ' + b"[" * DEEP + b"\n", b"\xff\xfe", b""]


@pytest.mark.parametrize("rows", ROWS, ids=["deep", "no text", "no checkpoint"])
def test_a_card_is_made_of_what_can_be_read(run: Path, tmp_path: Path, rows: bytes) -> None:
    (run / "results.jsonl").write_bytes(rows)
    if not rows:
        (run / "checkpoints" / "latest").unlink()
    sslkit.publish.export_encoder(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("The scores cannot be read." if not rows else "None recorded for these weights.") in text


@pytest.mark.parametrize("tag", [None, 3, "../x", "a b", "x" * 1000])
def test_a_tag_that_is_none(run: Path, tmp_path: Path, tag: Any) -> None:
    config = json.loads((run / "encoder" / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = tag
    (run / "encoder" / "config.json").write_text(json.dumps(config))
    assert "tag cannot be" in cli_error(["export", str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_shape_is_not_exported(run: Path, tmp_path: Path) -> None:
    weights = load_file(run / "encoder" / "model.safetensors")
    save_file(weights | {"norm.weight": torch.zeros(3)}, run / "encoder" / "model.safetensors")
    assert "such as norm.weight" in cli_error(["export", str(run), str(tmp_path / "out")])
    (run / "encoder" / "model.safetensors").write_bytes(b"torn")
    assert "not a complete safetensors file" in cli_error(["export", str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_projector_of_another_shape_is_not_fine_tuned(run: Path) -> None:
    weights = load_file(run / STEP / "model.safetensors")
    name = next(name for name in weights if name.startswith("projector."))
    save_file(weights | {name: torch.zeros(3)}, run / STEP / "model.safetensors")
    resign(run / STEP)
    options = ["--data", "builtin:fashion_mnist", "--labels", "1-shot", "--head-layers", "1"]
    assert "does not fit its recipe" in cli_error(["eval", "finetune", str(run), *options])
