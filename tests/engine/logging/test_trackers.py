"""Trackers are told what the files say, each step once, and whatever they do the run comes out the same."""

import importlib.util
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import small_recipe
from PIL import Image
from safetensors.torch import load_file

import sslkit
from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine.logging import trackers as track
from sslkit.engine.logging.sample_images import neighbours_image, views_image
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair
from sslkit.evaluate.probes.knn import KnnProtocol
from sslkit.evaluate.probes.sharded_bank import Shard, predict_by_shards
from sslkit.recipe.resolve import Recipe

# trackio reads it once, when it is imported.
os.environ["TRACKIO_DIR"] = (kept := tempfile.TemporaryDirectory(prefix="sslkit-trackio-")).name


class Recorder(GeneralTracker):
    """Keeps what it is told; ``trouble`` is called first, each time."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, trouble: Callable[[int], None] = lambda _count: None) -> None:
        super().__init__(_blank=True)
        self.trouble, self.calls, self.finished = trouble, 0, False
        self.told: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, float], step: int | None = None, **_kwargs: Any) -> None:
        self.calls += 1
        self.trouble(self.calls)
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


def recipe_of(steps: int, *names: str, **tables: Any) -> Recipe:
    tables = {"checkpoint": {"every_steps": 2, "keep": 9}, "track": {"with": list(names)}, **tables}
    return small_recipe(
        "moco_v3",
        "test_vit",
        backbone={"name": "test_vit", "args": {"drop_path_rate": 0.2}},
        train={"max_steps": steps, "batch_size": 100},
        **tables,
    )


@pytest.fixture
def monitor(class_folders: Path) -> dict[str, Any]:
    return {"every_epochs": 1, "data": str(class_folders), "k": 3, "diagnose_every": 2}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[GeneralTracker], None]:
    """Stand in for TensorBoard by a tracker, where the package need not be installed."""

    def stand_in(tracker: GeneralTracker) -> None:
        monkeypatch.setattr(track, "check_trackers", lambda recipe: None)
        monkeypatch.setattr("sslkit.engine.trainer.check_trackers", lambda recipe: None)
        monkeypatch.setitem(track.MODULES, "tensorboard", "json")
        monkeypatch.setattr(track.Trackers, "_start", lambda *_: tracker)
        monkeypatch.setattr(
            track, "_log_image", lambda tracker, name, step, pixels: tracker.log({name: pixels}, step=step)
        )

    return stand_in


def test_a_tracker_is_told_each_step_once_through_stops_and_a_lost_checkpoint(
    tmp_path: Path, installed: Callable[[GeneralTracker], None], monitor: dict[str, Any]
) -> None:
    recorder = Recorder()
    installed(recorder)
    sslkit.train(recipe_of(5, "tensorboard", monitor=monitor), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")  # as if killed before it was there
    run = sslkit.train(recipe_of(8, "tensorboard", monitor=monitor), tmp_path / "run")
    assert recorder.finished
    steps = [step for step, _ in recorder.told if step is not None]
    assert steps == sorted(steps)
    lines = [(step, values) for step, values in recorder.told if "train/loss" in values]
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    for (_, values), row in zip(lines, run.metrics(), strict=True):
        if row["step"] == 5:  # told the first time, written the second, to the same bits but for speed
            row = {**row, **{name: values[f"train/{name}"] for name in ("images_per_second", "data_wait")}}
        assert values == {f"train/{name}": value for name, value in row.items() if name != "step"}
    knn = [(step, values["monitor/knn"]) for step, values in recorder.told if "monitor/knn" in values]
    assert [step for step, _ in knn] == [5, 8]
    assert knn[-1] == (8, run.results()[-1]["accuracy"])
    assert [step for step, values in recorder.told if "diagnostics/lidar" in values] == [5, 8]
    shown = [
        (step, name, values[name].shape)
        for step, values in recorder.told
        for name in ("views", "neighbours")
        if name in values
    ]
    assert shown == [
        (0, "views", (8 * 32, 7 * 32, 3)),
        (5, "neighbours", (8 * 96, 7 * 96, 3)),
        (8, "neighbours", (8 * 96, 7 * 96, 3)),
    ]


def fail(count: int, at: int, error: BaseException) -> None:
    if count == at:
        raise error


def hang(_count: int) -> None:
    threading.Event().wait(60)


@pytest.mark.full
@pytest.mark.parametrize(
    ("trouble", "warning"),
    [
        (partial(fail, at=2, error=OSError(28, "No space left on device")), "fails: [Errno 28] No space left"),
        (partial(fail, at=1, error=ConnectionError("server away\nand more")), "fails: server away; the run continues"),
        (partial(fail, at=3, error=SystemExit(3)), "fails: 3; the run continues"),
        (hang, "did not finish in time"),
    ],
    ids=["disk full", "server away", "exits", "hangs"],
)
def test_no_trouble_of_a_tracker_reaches_the_run(
    trouble: Callable[[int], None],
    warning: str,
    tmp_path: Path,
    installed: Callable[[GeneralTracker], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(track, "CLOSE_SECONDS", 0.5)
    sslkit.train(recipe_of(3), tmp_path / "without")
    installed(Recorder(trouble))
    sslkit.train(recipe_of(3, "tensorboard"), tmp_path / "with")
    printed = capsys.readouterr().out
    assert printed.count("WARNING: tracker tensorboard") == 1
    assert warning in printed
    assert_same_weights(tmp_path / "without", tmp_path / "with", 3)


def test_a_tracker_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "FIRST_PAUSE", 0.0)
    made: list[Recorder] = []
    said: list[str] = []

    def start() -> GeneralTracker:
        made.append(Recorder(partial(fail, at=2, error=OSError("away")) if not made else lambda _count: None))
        return made[-1]

    one = track.TrackerThread("tensorboard", start, said.append)
    for step in range(1, 6):
        one.submit(lambda tracker, step=step: tracker.log({}, step=step))  # type: ignore[misc]
    one.close(time.monotonic() + 30)
    assert [[step for step, _ in recorder.told] for recorder in made] == [[1], [3, 4, 5]]
    assert all(recorder.finished for recorder in made)
    assert len(said) == 1


def test_a_slow_tracker_costs_lines_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "QUEUE_SIZE", 10)
    gate, said, recorder = threading.Event(), list[str](), Recorder(lambda _count: assert_opens(gate))
    one = track.TrackerThread("tensorboard", lambda: recorder, said.append)
    for step in range(1, 101):
        one.submit(lambda tracker, step=step: tracker.log({}, step=step))  # type: ignore[misc]
    gate.set()
    one.close(time.monotonic() + 30)
    assert 10 <= len(recorder.told) <= 11
    assert len(said) == 1
    assert "more are left out" in said[0]


def assert_opens(gate: threading.Event) -> None:
    assert gate.wait(30)


def test_the_table_is_read_and_may_change_when_a_run_is_continued(
    tmp_path: Path, installed: Callable[[GeneralTracker], None]
) -> None:
    with pytest.raises(UserError, match=r"\[track\] with: .*'tensorboard', 'wandb', 'trackio' or 'mlflow'"):
        recipe_of(1, "tensorbord")
    with pytest.raises(UserError, match="with names a tracker twice"):
        recipe_of(1, "wandb", "wandb")
    with pytest.raises(UserError, match="did you mean 'with'"):
        small_recipe(track={"wit": []})
    assert recipe_of(1, "mlflow").as_tables()["track"] == {"with": ["mlflow"], "project": "sslkit", "images": True}
    sslkit.train(recipe_of(1), tmp_path / "run")
    saved = tmp_path / "run" / "recipe.toml"
    saved.write_text(saved.read_text().replace('[track]\nwith = []\nproject = "sslkit"\nimages = true\n', ""))
    assert "[track]" not in saved.read_text()  # as sslkit wrote it before there were trackers
    recorder = Recorder()
    installed(recorder)
    sslkit.train(recipe_of(2, "tensorboard"), tmp_path / "run")
    assert [step for step, values in recorder.told if "train/loss" in values] == [2]


def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"'mlflow' is not installed; `pip install mlflow`"):
        sslkit.train(recipe_of(1, "mlflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    if find("wandb") is None:  # a folder that a tracker has left is not the package
        (tmp_path / "wandb").mkdir()
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(UserError, match="'wandb' is not installed"):
            track.check_trackers(recipe_of(1, "wandb"))


def test_views_are_the_ones_that_the_run_sees() -> None:
    recipe = recipe_of(1)
    source = open_source(recipe.data).without_labels()
    sheet, pipeline = views_image(recipe, source), ViewPipeline(recipe.views, recipe.train.seed)
    for row, sample in ((0, 0), (7, len(source) - 1)):
        image = source.read(sample)
        for column, (epoch, view) in ((1, (0, 0)), (2, (0, 1)), (5, (2, 0))):
            seen = pipeline(image, epoch, sample)[view]
            assert np.array_equal(sheet[32 * row : 32 * row + 32, 32 * column : 32 * column + 32], seen)


def test_neighbours_are_the_nearest_that_can_be_read() -> None:
    pair = open_pair(DataConfig(path="builtin:fashion_mnist"))
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 8, generator=generator) * torch.rand(40, 1, generator=generator)
    queries = torch.randn(20, 8, generator=generator)
    kept, asked = torch.rand(40, generator=generator) > 0.3, torch.rand(20, generator=generator) > 0.3
    cosine = (queries.double() @ bank.double().T) / bank.double().norm(dim=1)
    cosine[:, ~kept] = -torch.inf
    shards = Shard(queries, asked, queries.device), Shard(bank, kept, bank.device)
    _, nearest_rows = predict_by_shards(*shards, torch.arange(40), 40, KnnProtocol(k=3), most=6)
    sheet = neighbours_image(pair, nearest_rows, asked, seed=1)
    tiles = sheet.reshape(8, 96, 7, 96, 3).transpose(0, 2, 1, 3, 4)
    images = {index: enlarge(pair.test.read(index)) for index in range(20) if asked[index]}
    for row in tiles:
        (query,) = (index for index, image in images.items() if np.array_equal(image, row[0]))
        for place, tile in enumerate(row[1:]):
            near = int(cosine[query].argsort(descending=True)[place])
            assert np.array_equal(tile, enlarge(pair.train.read(near)))


def enlarge(pixels: Any) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BILINEAR))


def twice(folder: Path, name: str, monitor: dict[str, Any], project: str = "sslkit") -> sslkit.Run:
    """A run that is stopped and continued, with a real tracker; to the same bits as one without."""
    table = {"with": [name], "project": project}
    sslkit.train(recipe_of(2, monitor=monitor, track=table), folder)
    run = sslkit.train(recipe_of(4, monitor=monitor, track=table), folder)
    assert_same_weights(folder, sslkit.train(recipe_of(4), folder.parent / "without").folder, 4)
    return run


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    model = f"checkpoints/step-{step:08d}/model.safetensors"
    ours, theirs = load_file(one / model), load_file(other / model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tensorboard_has_one_curve_and_the_pictures(tmp_path: Path, monitor: dict[str, Any]) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = twice(tmp_path / "run", "tensorboard", monitor)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in run.metrics()]
    assert [event.step for event in events.Scalars("monitor/knn")] == [2, 4]
    assert [event.step for event in events.Images("neighbours")] == [2, 4]
    (views,) = events.Images("views")
    assert (views.step, views.height, views.width) == (0, 256, 224)
    assert "moco_v3" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_mlflow_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: dict[str, Any]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    run = twice(tmp_path / "run", "mlflow", monitor)
    client = mlflow.MlflowClient()
    (experiment,) = [each for each in client.search_experiments() if each.name == "sslkit"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == json.loads((tmp_path / "run" / "track.json").read_text())["mlflow"]
    losses = [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, "train/loss")]
    assert losses == [(row["step"], row["loss"]) for row in run.metrics()]
    assert found.data.params["method.name"] == "moco_v3"
    assert [each.path for each in client.list_artifacts(found.info.run_id, "neighbours")] == [
        "neighbours/step-00000002.png",
        "neighbours/step-00000004.png",
    ]


def test_mlflow_with_its_server_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = sslkit.train(recipe_of(2, "mlflow"), tmp_path / "run")
    assert run.step == 2
    printed = capsys.readouterr().out
    assert printed.count("WARNING: tracker mlflow") == 1


def test_trackio_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: dict[str, Any]
) -> None:
    utils = pytest.importorskip("trackio.utils")
    project = f"sslkit-test-{tmp_path.parent.name}"
    run = twice(tmp_path / "run", "trackio", monitor, project)
    with sqlite3.connect(Path(utils.TRACKIO_DIR) / f"{project}.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    rows = [(name, step, json.loads(values)) for name, step, values in rows]
    assert {name for name, _, _ in rows} == {f"run-{json.loads((run.folder / 'track.json').read_text())['id'][:6]}"}
    losses = [(step, values["train/loss"]) for _, step, values in rows if "train/loss" in values]
    assert losses == [(row["step"], row["loss"]) for row in run.metrics()]
    assert [step for _, step, values in rows if "neighbours" in values] == [2, 4]


def test_wandb_writes_offline_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: dict[str, Any]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    twice(tmp_path / "run", "wandb", monitor)
    kept = json.loads((tmp_path / "run" / "track.json").read_text())["id"]
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{kept}") for folder in folders)
    assert all((folder / f"run-{kept}.wandb").stat().st_size > 0 for folder in folders)
    pictures = sorted(path.name.split("_")[:2] for folder in folders for path in folder.rglob("*.png"))
    assert pictures == [["neighbours", "2"], ["neighbours", "4"], ["views", "0"]]


@pytest.mark.parametrize("text", ["[1]", "{", '{"id": "../../elsewhere"}', '{"id": 3}', "[" * 5000], ids=range(5))
def test_a_memory_that_is_none_is_made_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "track.json").write_text(text)
    recipe = recipe_of(1, "tensorboard")
    made = track.Trackers(recipe, tmp_path, print, active=True).ids["id"]
    assert len(made) == 12
    assert track.Trackers(recipe, tmp_path, print, active=True).ids == {"id": made}
