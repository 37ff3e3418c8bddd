"""Rows that lack keys, hold something else, or are torn: left out and counted aloud by whoever reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe

import sslkit
from sslkit.cli import main
from sslkit.cli.eval_commands import _scores_of
from sslkit.engine.checkpoint.retention import monitor_scores
from sslkit.engine.logging.logger import RunLogger
from sslkit.engine.monitor.alarms import read_curve
from sslkit.files.jsonl_reader import _warn_once, read_log
from sslkit.publish.card_scores import newest_scores
from sslkit.recipe.resolve import Recipe
from sslkit.report.accuracy_figures import accuracy_panel, score_rows
from sslkit.report.health_figures import collapse_panels, gradient_panel
from sslkit.report.pictures import draw_curves
from sslkit.report.run_record import read_run
from sslkit.report.summary import alarms_of, summarise
from sslkit.report.training_figures import training_panels
from sslkit.watch.watched_run import WatchedRun

MONITOR = {"step": 2, "epoch": 1.0, "by": "monitor", "evaluation": "knn k=20", "data": "x", "accuracy": 0.5}
NONE = [b"[1]", b"3", b'"x"', b"null", b"true", b"{", b'{"step": 2, "accur', b"\xff\xfe", b"\0", b"[" * 100_000]
STEPS: list[Any] = [None, "2", True, float("nan"), [2], {}, -1, 10**400]
# Each is a row of its file but for one key, which is gone or holds something that it cannot be.
ODD = {
    "metrics": NONE
    + [{}, {"step": 2}, {"epoch": 0.5, "loss": 1.0}]
    + [{"step": each, "epoch": 0.5, "loss": 1.0} for each in STEPS]
    + [{"step": 2, "epoch": each, "loss": 1.0} for each in STEPS],
    "results": NONE
    + [{}, {key: value for key, value in MONITOR.items() if key != "step"}]
    + [{key: value for key, value in MONITOR.items() if key != "accuracy"}]
    + [{**MONITOR, "step": each} for each in (*STEPS, 2.5)]
    + [{**MONITOR, "accuracy": each} for each in (*STEPS, 1.5, float("inf"))]
    + [{**MONITOR, key: None} for key in ("by", "evaluation", "data", "measure", "protocol", "scores", "epoch")]
    + [{**MONITOR, key: 3} for key in ("by", "evaluation", "data", "measure", "protocol_hash", "interval", "scores")]
    + [{**MONITOR, "interval": each} for each in ([1], ["a", "b"], [None, None], {}, "ab")]
    + [{**MONITOR, "scores": each} for each in ([1], ["x"], {}, [None])]
    + [{**MONITOR, "epoch": each} for each in ("1", [1], float("nan"))],
    "diagnostics": NONE
    + [{}, {"alarms": []}]
    + [{"step": each, "alarms": []} for each in STEPS]
    + [{"step": 2, "alarms": each} for each in ("spike: x", None, 3, {}, [1], [None])],
}
# Of keys that a row need not have, anything may be there: the row counts, and what is no number is not drawn.
STRANGE: list[Any] = [None, "x", [1, [2]], {}, True, float("nan"), 1e308, 10**400, "\ud800"]


def as_line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return small_recipe(
        "moco_v2",
        "test_resnet",
        train={"max_steps": 2, "log_every": 1},
        monitor={"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 60, "diagnose_every": 1},
        checkpoint={"keep_best": "knn"},
    )


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("odd") / "run"
    sslkit.train(recipe, run)
    with (run / "results.jsonl").open("a") as stream:
        row = {**MONITOR, "by": "eval", "step": 2, "protocol": {}, "protocol_hash": "0123456789ab", "interval": [0, 1]}
        stream.write(json.dumps({**row, "scores": [{"encoder": "x", "accuracy": 0.5}] * 2}) + "\n")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def put_in(run: Path, file: str, rows: list[Any]) -> None:
    """Odd rows before, between and after those of a run; the last one is not ended."""
    path = run / f"{file}.jsonl"
    lines = path.read_bytes().splitlines()
    odd = [as_line(row) for row in rows]
    path.write_bytes(b"\n".join([*odd, lines[0], *odd, *lines[1:], *odd]))


def look(run: Path) -> Any:
    """What every reader of rows makes of a run, but for those that take longer."""
    record = read_run(run)
    watched = WatchedRun(run)
    while watched.read_new():
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "log_message", lambda *_: None)
        said = RunLogger(run, 2, active=True).alarms_raised
    return (
        [record.metrics, record.results, record.diagnostics],
        [panel.figure for panel in [*training_panels([record]), accuracy_panel([record])]],
        [panel.figure for panel in [gradient_panel(record, "x"), *collapse_panels([record])]],
        (score_rows([record]), summarise(record), alarms_of(record), said),
        (newest_scores(run), _scores_of(run), monitor_scores(run / "results.jsonl", "knn")),
        read_curve(record.metrics, record.results),
        (watched.step, watched.epoch, watched.knn.means, list(watched.scores), watched.alarms, set(watched.metrics)),
    )


@pytest.mark.parametrize("file", ODD)
def test_every_odd_row_is_left_out_and_counted(run: Path, file: str) -> None:
    before, whole = (run / f"{file}.jsonl").read_bytes(), read_log(run / f"{file}.jsonl")
    assert not whole.warning
    for row in ODD[file]:
        (run / f"{file}.jsonl").write_bytes(before + as_line(row) + b"\n")
        log = read_log(run / f"{file}.jsonl")
        assert log.rows == whole.rows, row
        assert f"skipped 1 of {whole.num_lines + 1} lines: line {whole.num_lines + 1} " in log.warning, row
        assert len(log.warning) < 500


@pytest.mark.parametrize("file", ODD)
def test_all_readers_see_the_same_run_with_and_without_them(run: Path, file: str) -> None:
    whole = look(run)
    put_in(run, file, ODD[file])
    assert look(run) == whole


@pytest.mark.parametrize("file", ODD)
def test_other_keys_may_hold_anything(run: Path, file: str) -> None:
    keys = (
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "gradient/x",
        "momentum",
        "images_per_second",
        "embedding_std",
        "left_out",
    )
    keys = tuple(key for key in keys if not (file == "results" and key == "accuracy"))
    row = MONITOR if file == "results" else {"step": 5, "epoch": 2.5}
    put_in(run, file, [{**row, "step": 5 + number, key: value} for number, value in enumerate(STRANGE) for key in keys])
    look(run)
    draw_curves(run)


def test_commands_say_how_many(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """report, export, publish and watch end well, and name the file once each."""
    for file, rows in ODD.items():
        put_in(run, file, rows)
    commands = {
        "report": ["report", str(run), "--no-gallery"],
        "export": ["export", str(run), str(tmp_path / "encoder")],
        "publish": ["publish", str(run), "--repo-id", "user/name", "--dry-run"],
        "compare": ["eval", "compare", str(run), str(run / "../run")],
        "watch": ["watch", str(run), "--once"],
    }
    said = {}
    for name, words in commands.items():
        _warn_once.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, capsys.readouterr().err
        said[name] = capsys.readouterr()
    assert all(
        said["report"].err.count(f"{file}.jsonl: skipped {3 * len(rows)} of ") == 1 for file, rows in ODD.items()
    )
    for name in ("export", "publish", "compare"):
        assert "results.jsonl: " in said[name].err
    assert "lines skipped" in said["watch"].out
    assert "50.0%" in (tmp_path / "encoder/README.md").read_text()
    assert "50.0%" in (run / "publish/README.md").read_text()


def test_a_run_goes_on(run: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued over its files full of odd rows, it keeps the rows that are none of its own as they are."""
    whole = [read_log(run / f"{file}.jsonl").rows for file in ODD]
    for file, rows in ODD.items():
        put_in(run, file, rows)
    (run / "bad_samples.jsonl").write_bytes(b"\n".join(NONE) + b'\n{"index": "x", "name": 3}\n')
    tables = recipe.as_tables()
    tables["train"]["max_steps"] = 4
    assert sslkit.train(sslkit.recipe.resolve.build_recipe(tables), run).step == 4
    found = [read_log(run / f"{file}.jsonl").rows for file in ODD]
    assert all(now[: len(before)] == before for before, now in zip(whole, found, strict=True))
    assert [row["step"] for row in found[0]] == [1, 2, 3, 4]
    assert [row["step"] for row in found[1] if row["by"] == "monitor"] == [2, 4]
    assert ": skipped " in capsys.readouterr().out
