"""First starts that are killed or find no room, starts that overtake each other, and checkpoints of other runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_start import make_images, small_run
from launching import HERE
from safetensors.torch import load_file, save_file
from torch import Tensor

import sslkit
from sslkit.engine import trainer
from sslkit.engine.checkpoint.format import newest_checkpoint, restore
from sslkit.engine.optim import make_optimizer
from sslkit.engine.run_folder import lock
from sslkit.engine.setup import build_method
from sslkit.errors import UserError
from sslkit.profiling.step_profile import profile
from sslkit.recipe.resolve import Recipe, build_recipe

STEP = "checkpoints/step-00000001"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("starting") / "images")


@pytest.fixture(scope="module")
def finished(images: Path) -> Path:
    """A run of one step."""
    sslkit.train(small_run(images), images.parent / "finished")
    return images.parent / "finished"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def changed(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """A recipe with other keys."""
    before = recipe.as_tables()
    return build_recipe(before | {table: before[table] | keys for table, keys in tables.items()})


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_recipes_remarks_are_said(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sslkit.train(replace(small_run(images), remarks=("these numbers are of another run",)), run)
    assert "these numbers are of another run\n" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_first_start_that_ends_at_any_write_is_continued_by_the_same_command(how: str, tmp_path: Path) -> None:
    path = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "dying_start.py"), how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("write ") > 15
    assert "left ['.lock', 'checkpoints', 'data.json'" in done.stdout or how == "full"


BEGUN = [".lock", ".probe.tmp", ".recipe.tmp", ".recipe.toml.tmp", ".data.json.tmp", ".images.parquet.tmp"]


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/notes.txt", "checkpoints/step-00000001/x", ".notes.tmp"])
def test_a_folder_with_anything_else_is_refused_and_stays_as_it_is(name: str, images: Path, tmp_path: Path) -> None:
    for left in [*BEGUN, name]:
        (tmp_path / "run" / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / left).write_text("x")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"not a run, such as .*; choose a new or empty folder"):
        sslkit.train(small_run(images), tmp_path / "run")
    assert files(tmp_path) == before


def test_what_a_killed_first_start_knew_of_its_images_binds_no_other(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "data.json").write_text('{"images": 3, "names_sha256": "x", "content": {}}')
    (run / "images.parquet").write_bytes(b"torn")
    sslkit.train(small_run(images), run)
    assert json.loads((run / "data.json").read_text())["images"] == 8
    sslkit.train(small_run(images), run)


def test_a_refused_start_leaves_no_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size"):
        sslkit.train(changed(small_run(images), train={"batch_size": 64}), tmp_path / "a/b/run")
    assert not list(tmp_path.iterdir())


def test_a_start_leaves_alone_what_other_commands_are_writing(images: Path, run: Path) -> None:
    """A report, a page of another name, and publish's folder; what a killed run left is swept."""
    theirs, ours = (".report.html.tmp", ".page.html.tmp", ".publish.tmp/x"), (".encoder.tmp/x", ".results.jsonl.tmp")
    for name in (*theirs, *ours):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    sslkit.train(changed(small_run(images), train={"max_steps": 2}), run)
    assert {file.name for file in run.glob(".*")} == {".report.html.tmp", ".page.html.tmp", ".publish.tmp"}


def overtake(monkeypatch: pytest.MonkeyPatch, finished: Path, run: Path) -> None:
    """Let another start train from the first step to the last, just before this one takes the lock."""
    take = lock._take

    def late(folder: Path) -> tuple[int, list[str]]:
        shutil.copytree(finished, run, dirs_exist_ok=True)
        return take(folder)

    monkeypatch.setattr(lock, "_take", late)


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_that_another_overtook_sees_what_that_left(
    begun: bool, images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    if begun:
        run.mkdir()
        shutil.copy(finished / "recipe.toml", run)
    before = files(finished)
    overtake(monkeypatch, finished, run)
    monkeypatch.setattr(trainer, "run_loop", None)  # not a step is made
    assert sslkit.train(small_run(images), run).step == 1
    after = files(run)
    assert before.keys() == after.keys()
    assert all(after[name] == content for name, content in before.items() if name != "recipe.toml")


@pytest.mark.parametrize("case", ["never", "seed"])
def test_a_start_that_another_overtook_refuses_as_a_later_one_would(
    case: str, images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "run", small_run(images)
    words = {"never": "already holds a run", "seed": r"train\.seed: 0 -> 5"}[case]
    if case == "seed":
        recipe = changed(recipe, train={"seed": 5})
    overtake(monkeypatch, finished, run)
    with pytest.raises(UserError, match=words):
        sslkit.train(recipe, run, "never" if case == "never" else "auto")
    assert files(run) == files(finished)


def test_the_newest_checkpoint_has_the_largest_number(finished: Path, tmp_path: Path) -> None:
    """Not the last name: 100 000 000 steps have nine digits."""
    for step in (99_999_999, 100_000_000, 1):
        folder = tmp_path / f"step-{step:08d}"
        shutil.copytree(finished / STEP, folder)
        edit(folder, state={"step": step})
    newest, complaints = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, complaints) == (100_000_000, [])
    assert newest.folder == tmp_path / "step-100000000"


def edit(checkpoint: Path, state: dict[str, Any] | None = None, **tensors: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a checkpoint, and its manifest so that it agrees."""
    content = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(content | (state or {})))
    for name, change in tensors.items():
        file = checkpoint / f"{name}.safetensors"
        save_file(change(load_file(file)), file)
    entries = {}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        saved = (checkpoint / name).read_bytes()
        entries[name] = {"bytes": len(saved), "sha256": hashlib.sha256(saved).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))


def continued(recipe: Recipe, run: Path, resume: str = "auto") -> str:
    """What is said when a run is continued, which must leave its folder as it is."""
    before = files(run)
    with pytest.raises(UserError) as caught:
        sslkit.train(changed(recipe, train={"max_steps": 2}), run, resume)
    assert files(run) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_seed_is_not_continued(images: Path, run: Path, tmp_path: Path) -> None:
    recipe = small_run(images)
    sslkit.train(changed(recipe, train={"seed": 5}), tmp_path / "other")
    shutil.rmtree(run / STEP)
    shutil.copytree(tmp_path / "other" / STEP, run / STEP)
    said = continued(recipe, run)
    assert f"{run / STEP}: was saved by a run of another recipe: train.seed: 5 -> 0; move it away" in said
    moved = (run / STEP).rename(tmp_path / "moved")  # as advised
    assert sslkit.train(recipe, run).step == 1
    other = sslkit.train(changed(recipe, train={"max_steps": 2}), tmp_path / "third", resume=str(moved))
    assert [row["step"] for row in other.metrics()] == [2]


def test_a_checkpoint_of_other_images_is_not_continued(images: Path, run: Path) -> None:
    edit(run / STEP, {"images": "another sum"})
    assert f"{run / STEP}: was saved by a run on other images; move it away" in continued(small_run(images), run)


def test_keys_that_are_free_and_keys_that_are_newer_are_no_difference(images: Path, run: Path) -> None:
    state = json.loads((run / STEP / "state.json").read_text())
    recipe = state["recipe"]
    recipe["checkpoint"]["keep"], recipe["train"]["log_every"] = 7, 3
    del recipe["guard"], recipe["train"]["clip_norm"]
    without = {name: value for name, value in state.items() if name not in ("images", "without_state", "scaler")}
    (run / STEP / "state.json").write_text(json.dumps(without | {"recipe": recipe}))
    edit(run / STEP)
    assert sslkit.train(changed(small_run(images), train={"max_steps": 2}), run).step == 2


NORM = "backbone.bn1.weight"


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith(name)}


UNFIT: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "half precision": ("model", lambda now: {key: value.half() if value.is_floating_point() else value
                                             for key, value in now.items()}, "is float16 .*, must be float32 "),
    "one in bfloat16": ("model", lambda now: now | {NORM: now[NORM].bfloat16()}, f"{NORM} is bfloat16 .*, must be"),
    "another shape": ("model", lambda now: now | {NORM: now[NORM][:3]}, rf"{NORM} is float32 \(3,\), must be float32 "),
    "one is missing": ("model", lambda now: without(now, NORM), f"{NORM} is missing, must be float32"),
    "one too many": ("model", lambda now: now | {"evil": torch.zeros(3)}, "which has no evil"),
    "no momenta": ("optimizer", lambda _now: {}, "has no .* of '"),
    "one momentum is missing": ("optimizer", lambda now: without(now, f"{NORM}/"), f"has no .* of '{NORM}'"),
    "a momentum in half precision": ("optimizer", lambda now: {key: value.half() for key, value in now.items()},
                                     "is torch.float16, must be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adam(images: Path) -> tuple[Recipe, Path]:
    """A run with AdamW, which remembers most."""
    recipe = changed(small_run(images), optim={"name": "adamw", "weight_decay": 0.1})
    sslkit.train(recipe, images.parent / "adam")
    return recipe, images.parent / "adam"


@pytest.mark.full
@pytest.mark.parametrize("case", UNFIT)
def test_what_is_missing_or_of_another_kind_is_named(case: str, adam: tuple[Recipe, Path], tmp_path: Path) -> None:
    """By ``auto``, by the checkpoint's path, and where a run goes back."""
    recipe, run = adam[0], Path(shutil.copytree(adam[1], tmp_path / "run"))
    name, change, words = UNFIT[case]
    edit(run / STEP, **{name: change})
    for resume in ("auto", str(run / STEP)):
        said = continued(recipe, run, resume)
        assert str(run / STEP) in said
        with pytest.raises(UserError, match=words):
            raise UserError(said)
    newest, _ = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    method = build_method(recipe, 8)
    with pytest.raises(UserError, match=words):
        restore(newest, method, make_optimizer(recipe, method))


def test_steps_that_lamb_counts_by_group_are_not_missed(images: Path, tmp_path: Path) -> None:
    recipe = changed(small_run(images), optim={"name": "lamb", "weight_decay": 0.1})
    sslkit.train(recipe, tmp_path / "run")
    edit(tmp_path / "run" / STEP, optimizer=lambda now: without(now, "param_groups.0/"))
    assert "has no step count of param_groups.0" in continued(recipe, tmp_path / "run")


def test_a_backbone_that_rests_has_no_momenta_to_miss(images: Path, tmp_path: Path) -> None:
    recipe = changed(small_run(images), optim={"name": "lars"}, train={"head_warmup_epochs": 1.0, "max_steps": 1})
    run = sslkit.train(recipe, tmp_path / "run").folder
    state = json.loads((run / STEP / "state.json").read_text())
    assert {name.partition(".")[0] for name in state["without_state"]} == {"backbone"}
    assert sslkit.train(changed(recipe, train={"max_steps": 2}), run).step == 2
    edit(run / "checkpoints/step-00000002", optimizer=lambda now: without(now, "projector."))
    assert "has no momentum_buffer of 'projector." in continued(changed(recipe, train={"max_steps": 3}), run)


def test_a_checkpoint_of_an_earlier_version_need_not_say_what_it_lacks(
    adam: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """Then only one without any momenta is refused."""
    recipe = adam[0]
    for count, change in enumerate((lambda now: without(now, f"{NORM}/"), lambda _now: {})):
        run = Path(shutil.copytree(adam[1], tmp_path / f"run{count}"))
        edit(run / STEP, optimizer=change)
        state = json.loads((run / STEP / "state.json").read_text())
        del state["without_state"]
        (run / STEP / "state.json").write_text(json.dumps(state))
        edit(run / STEP)
        if count:
            assert "has no exp_avg, exp_avg_sq, step of" in continued(recipe, run) or "has no step, " in continued(
                recipe, run
            )
        else:
            assert sslkit.train(changed(recipe, train={"max_steps": 2}), run).step == 2


def test_profiling_beside_a_run_leaves_its_list_of_bad_images_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = '{"index": 0, "name": "x", "reason": "y", "epoch": 1, "step": 7}\n'
    (tmp_path / "bad_samples.jsonl").write_text(line)
    profile(small_run(images), seconds=0.1)
    assert (tmp_path / "bad_samples.jsonl").read_text() == line
