"""``sslkit bench`` makes the steps of a run, counts each part once, and advises by numbers checked by hand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import small_recipe
from launching import finish, start
from safetensors.torch import load_file

import sslkit
from sslkit.cli import main
from sslkit.data.sources.image_source import open_source
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.setup import make_train_loader, set_up_training
from sslkit.engine.state import TrainingState
from sslkit.engine.steps_in_flight import steps_to_measure
from sslkit.errors import UserError
from sslkit.profiling import Profile, changes_that_help, check_trace, profile
from sslkit.profiling import stage_timer as timer_module
from sslkit.profiling.image_cost import ImageCosts
from sslkit.profiling.stage_timer import BACKWARD, COLLECTIVES, OPTIMIZER, STAGES, STUDENT, TEACHER, StageTimer, timed
from sslkit.profiling.step_profile import CPU, compare_precisions, step
from sslkit.profiling.step_trace import busy_share
from sslkit.recipe.resolve import Recipe

STEPS = 3
MARKS = ("waiting for data", STUDENT, TEACHER, BACKWARD, OPTIMIZER)
VIEWS = {"size": 224, "crop_scale": (0.2, 1.0)}
SMALL = ImageCosts(images=10, read=0.001, decode=0.004, views=0.005, crops=0.002, pixels=500 * 375)


def training_of(recipe: Recipe) -> TrainingState:
    training = set_up_training(recipe, open_source(recipe.data).without_labels(), make_accelerator(recipe))
    training.method.train()
    return training


@pytest.mark.full
@pytest.mark.parametrize(("name", "model"), [("moco_v2", "test_resnet"), ("moco_v3", "test_vit"), ("swav", "test_vit")])
@pytest.mark.parametrize("micro_batch", [0, 16])
def test_its_steps_are_those_of_a_run(name: str, model: str, micro_batch: int, tmp_path: Path) -> None:
    recipe = small_recipe(name, model, train={"max_steps": STEPS, "micro_batch": micro_batch})
    run = sslkit.train(recipe, tmp_path / "run")
    saved = load_file(run.folder / f"checkpoints/step-{STEPS:08d}/model.safetensors")
    training = training_of(recipe)
    with timed(training, StageTimer(CPU)):
        steps = steps_to_measure(training)
        for batch in make_train_loader(training, STEPS):
            step(training, batch, steps, StageTimer(CPU))
    own = training.method.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in saved)
    assert not {"student", "teacher", "objective", "after_update"} & vars(training.method).keys()
    assert dist.all_reduce.__module__.startswith("torch.distributed")
    assert not hasattr(dist.all_reduce, "__wrapped__") or "bench" not in repr(dist.all_reduce.__code__)


def test_a_stopwatch_counts_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 3, 6, 10, 15, 21, 28])  # of the clock, at each boundary
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: float(next(ticks)))
    timer = StageTimer(CPU)
    with timer.stage("outer"):
        with timer.stage("inner"):
            pass
        with timer.stage("inner"), timer.stage("innermost"):
            pass
    assert timer.seconds == {"outer": 1 + 3 + 7, "inner": 2 + 4 + 6, "innermost": 5}


def test_a_profile_of_a_real_recipe_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured = profile(small_recipe(), seconds=1.0)
    assert list(tmp_path.iterdir()) == []
    assert list(measured.stages) == list(STAGES)
    assert all(measured.stages[name] > 0 for name in (STUDENT, TEACHER, BACKWARD, OPTIMIZER))
    assert measured.stages[COLLECTIVES] == 0
    assert measured.step > measured.waiting >= 0
    assert measured.images.pixels == 28 * 28
    assert measured.batch == 32


def measured(**facts: Any) -> Profile:
    """A GPU whose step of 100 images computes for 0.1 s and waits 0.3 s for two workers."""
    stages = dict.fromkeys(STAGES, 0.0) | {STUDENT: 0.03, TEACHER: 0.02, BACKWARD: 0.04}
    whole: dict[str, Any] = {
        **{"device": "card", "process": 0, "processes": 1, "cores": 16, "workers": 2, "batch": 100, "steps": 10},
        **{"step": 0.4, "waiting": 0.3, "stages": stages, "images": SMALL, "bf16": None, "peak_bytes": 2**30},
    }
    return Profile(**{**whole, **facts})


def test_who_waits_for_data_is_told_to_load_faster() -> None:
    recipe = small_recipe(views=VIEWS)
    photos = replace(SMALL, pixels=4000 * 3000)
    best, *others = changes_that_help(measured(images=photos), recipe)
    # A batch costs 100 x 10 ms = 1 s of a core, and has 0.1 s: ten workers.
    assert (best.what, best.gain) == ("set data.workers = 10", pytest.approx(4.0))
    gains = {change.what: change.gain for change in others}
    # Without colours 7 ms: 0.35 s for two workers.
    assert gains['set views.device = "accelerator"'] == pytest.approx(0.4 / 0.35)
    # A crop of 0.2 of a square of 504 pixels has 225: enough for a view of 224.
    smaller = 0.005 * (504 * 504 * 4 / 3) / (4000 * 3000) + 0.005
    assert gains["run sslkit prepare --side 504"] == pytest.approx(0.4 / (100 * smaller / 2))


def test_cores_that_are_not_there_are_not_advised() -> None:
    changes = changes_that_help(measured(cores=2), small_recipe(views=VIEWS))
    assert not any("workers" in change.what for change in changes)
    assert not any("prepare" in change.what for change in changes)  # 500 x 375 is small enough already
    photos = {"images": replace(SMALL, pixels=4000 * 3000)}
    cpu = changes_that_help(measured(cores=2, peak_bytes=None, **photos), small_recipe(views=VIEWS))
    assert [change.what for change in cpu] == ["run sslkit prepare --side 504"]


def test_who_computes_is_told_to_compute_faster() -> None:
    busy = {"step": 0.1, "waiting": 0.0}
    assert changes_that_help(measured(**busy), small_recipe()) == []
    [change] = changes_that_help(measured(**busy, bf16=0.4), small_recipe())
    assert change.what == 'set train.precision = "bf16"'
    assert change.gain == pytest.approx(0.1 / (0.1 - 0.6 * 0.09))
    assert changes_that_help(measured(**busy, bf16=1.3), small_recipe()) == []
    [slices] = changes_that_help(measured(**busy), small_recipe(train={"micro_batch": 8}))
    assert slices.gain == pytest.approx(0.1 / 0.085)


def test_precisions_are_compared_on_the_backbone_alone() -> None:
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    assert compare_precisions(backbone, torch.randn(2, 3, 4, 4), seconds=0.05) > 0
    assert all(param.grad is None for param in backbone.parameters())


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(small_recipe().to_toml())
    with pytest.raises(SystemExit) as exited:
        main(["bench", str(file), "--seconds", "1", "--json"])
    assert exited.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images_per_second"] == pytest.approx(32 / printed["step"])
    assert {"what", "gain"} >= {key for change in printed["changes"] for key in change}


def test_a_trace_has_the_stages_of_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, file = tmp_path / "recipe.toml", tmp_path / "trace.json.gz"
    recipe.write_text(small_recipe("moco_v2", "test_resnet").to_toml())
    with pytest.raises(SystemExit) as exited:
        main(["bench", str(recipe), "--seconds", "1", "--trace", str(file)])
    assert exited.value.code == 0
    assert f"trace of three steps: {file}" in capsys.readouterr().out.replace("\n", " ")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    marks = [each for each in events if each.get("cat") == "user_annotation"]
    spans = {name: [(e["ts"], e["ts"] + e["dur"]) for e in marks if e["name"] == name] for name in {"step", *MARKS}}
    assert len(spans["step"]) == 3
    for name in MARKS:
        inside = [any(start <= a and b <= end for start, end in spans["step"]) for a, b in spans[name]]
        assert all(inside)
        assert len(inside) >= 3
    assert any(each["name"] == "aten::convolution_backward" for each in events)
    assert not [each for each in tmp_path.iterdir() if each not in (recipe, file)]


@pytest.mark.parametrize(
    ("name", "words"), [("trace.gz", r"\.json\.gz or \.json"), ("none/t.json", "a folder that exists")]
)
def test_a_trace_that_cannot_be_written_is_refused_at_once(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        check_trace(tmp_path / name)


def test_the_busy_share_counts_overlapping_kernels_once() -> None:
    assert busy_share([(1.0, 3.0), (2.0, 4.0), (2.5, 3.5), (6.0, 10.0)], begin=0.0) == pytest.approx(7 / 10)
    assert busy_share([(-2.0, 1.0), (3.0, 4.0)], begin=0.0) == pytest.approx(2 / 4)  # launched before


@pytest.mark.full
def test_two_processes_speak_once_and_count_collectives(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(small_recipe("moco_v2", "test_resnet").to_toml())
    process = start(["-m", "sslkit", "bench", str(file), "--seconds", "2", "--json"], processes=2)
    said = finish(process)
    assert process.returncode == 0, said
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    printed = json.loads(line)
    assert printed["processes"] == 2
    assert printed["batch"] == 16
    assert printed["stages"][COLLECTIVES] > 0


def test_images_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty"):
        profile(small_recipe(data={"path": str(tmp_path), "split": "train"}), seconds=1.0)
