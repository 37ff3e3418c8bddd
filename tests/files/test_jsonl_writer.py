"""Lines of several processes at once: each is there afterwards, whoever starts, goes back or is killed meanwhile."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sslkit.cli.output import print_and_store
from sslkit.engine.logging.logger import RunLogger, append_result
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import EvaluationResult, Score
from sslkit.files import jsonl_writer
from sslkit.files.jsonl_reader import read_log, rows_of
from sslkit.files.jsonl_writer import JsonlWriter, append_text, remove_after

FORK = multiprocessing.get_context("fork")
ROW = {"by": "eval", "evaluation": "knn", "data": "x", "accuracy": 0.5}


def evaluate(folder: Path, name: str, count: int) -> None:
    """Append rows as `sslkit eval` does."""
    draws = random.Random(name)
    for number in range(count):
        append_result(folder, {"step": 3, **ROW, "who": name, "number": number, "filler": "x" * draws.randrange(2000)})
        time.sleep(draws.uniform(0, 0.002))


def hammer(folder: Path, evaluators: int, count: int) -> None:
    """Evaluators append while a run starts again and again, and goes back."""
    processes = [FORK.Process(target=evaluate, args=(folder, str(each), count)) for each in range(evaluators)]
    for process in processes:
        process.start()
    step = 0
    while any(process.is_alive() for process in processes):
        step += 1
        logger = RunLogger(folder, step - 1, active=True)
        logger.log_result({"by": "monitor", "step": step, "epoch": 1.0, "accuracy": 0.25, "evaluation": "knn"})
        logger.log_result({"by": "monitor", "step": step + 1, "epoch": 1.0, "accuracy": 0.25, "evaluation": "knn"})
        logger.log_metrics({"step": step, "epoch": 1.0})
        logger.rewind(step)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert step > 5
    remove_after(folder / "results.jsonl", step, "monitor")


def written(folder: Path) -> tuple[list[tuple[str, int]], list[int]]:
    """The rows of evaluations and the steps of the run's own, as any reader of JSON lines finds them."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return (
        sorted((row["who"], row["number"]) for row in rows if row["by"] == "eval"),
        [row["step"] for row in rows if row["by"] == "monitor"],
    )


def test_no_row_is_lost_while_a_run_starts_and_goes_back(tmp_path: Path) -> None:
    hammer(tmp_path, evaluators=3, count=60)
    judged, watched = written(tmp_path)
    assert judged == [(str(who), number) for who in range(3) for number in range(60)]
    assert watched == list(range(1, len(watched) + 1))


def test_nor_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is then only appended to, and the reader passes over what was made again."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    hammer(tmp_path, evaluators=3, count=40)
    log = read_log(tmp_path / "results.jsonl")
    judged = sorted((row["who"], row["number"]) for row in log.rows if row["by"] == "eval")
    assert judged == [(str(who), number) for who in range(3) for number in range(40)]
    watched = [row["step"] for row in log.rows if row["by"] == "monitor"]
    assert watched[:-1] == list(range(1, len(watched)))


def acknowledge(folder: Path, told: Connection) -> None:
    """Append for ever, and tell of each row once it is written."""
    for number in range(10**9):
        append_result(folder, {"step": 3, **ROW, "who": str(os.getpid()), "number": number})
        told.send((str(os.getpid()), number))


def test_a_killed_writer_takes_nobody_elses_row_along(tmp_path: Path) -> None:
    """What was acknowledged is there, whenever its writer is killed; the lock goes with it."""
    acknowledged = []
    for kill in range(6):
        here, there = FORK.Pipe()
        process = FORK.Process(target=acknowledge, args=(tmp_path, there))
        process.start()
        acknowledged += [here.recv() for _ in range(3 + kill)]
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        there.close()
        while here.poll():
            try:
                acknowledged.append(here.recv())
            except EOFError:
                break
        RunLogger(tmp_path, kill, active=True).log_result(
            {"by": "monitor", "step": kill + 1, "epoch": 1.0, "accuracy": 0.5}
        )
    rows = rows_of(tmp_path / "results.jsonl")
    assert {(row["who"], row["number"]) for row in rows if row["by"] == "eval"} >= set(acknowledged)


def test_a_writer_that_waited_writes_to_the_file_that_took_the_place(tmp_path: Path) -> None:
    """Held just between the opening and the lock, while another takes lines out."""
    file = tmp_path / "results.jsonl"
    append_text(file, '{"by": "monitor", "step": 9, "accuracy": 0.1}\n')
    lock, waited = jsonl_writer._lock, []

    def late(stream: Any, deadline: float) -> bool:
        if not waited:
            waited.append(True)
            remove_after(file, 3, "monitor")
            assert file.read_text() == ""
        return lock(stream, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_writer, "_lock", late)
        append_text(file, '{"step": 3, "accuracy": 0.5}\n')
    assert [row["step"] for row in rows_of(file)] == [3]


def test_what_a_writer_without_locks_adds_meanwhile_is_taken_along(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append_text(file, '{"by": "monitor", "step": 9, "accuracy": 0.1}\n')
    replace = jsonl_writer.replace_file

    def replaced(*arguments: Any) -> None:
        with file.open("a") as older:
            replace(*arguments)
            older.write('{"step": 4, "accuracy": 0.5}\n')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_writer, "replace_file", replaced)
        remove_after(file, 3, "monitor")
    assert [row["step"] for row in rows_of(file)] == [4]


def test_taking_lines_out_touches_no_others(tmp_path: Path) -> None:
    """Rows of others, odd ones and half ones stay as they are, byte for byte; a file with nothing to take out too."""
    others = b'{"by": "eval", "step": 99, "accuracy": 0.5,   "x": NaN}\n{"by": "eval", "st\n[1]\n{"by": "monitor"}\n'
    file = tmp_path / "results.jsonl"
    file.write_bytes(others + b'{"by": "monitor", "step": 5}\n')
    assert remove_after(file, 4, "monitor") == 5
    assert file.read_bytes() == others
    before = file.stat().st_ino
    assert remove_after(file, 4, "monitor") == 0
    assert file.stat().st_ino == before


def test_a_frozen_writer_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_writer, "LOCK_TIMEOUT", 0.05)
    file = tmp_path / "results.jsonl"
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        append_text(file, '{"by": "monitor", "step": 9, "accuracy": 0.5}\n')
        assert remove_after(file, 3, "monitor") == 9
        append_text(file, '{"by": "monitor", "step": 4, "accuracy": 0.5}\n')
    assert [row["step"] for row in rows_of(file)] == [4]


def test_lines_that_cannot_be_taken_out_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when a run goes back: it goes on, and what waits for room of the steps left is forgotten."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    lines = JsonlWriter(tmp_path / "metrics.jsonl", said.append)
    for step in (1, 2, 3):
        lines.append({"step": step, "epoch": 1.0, "loss": step})
    with monkeypatch.context() as patch:
        for name in ("replace_file", "append_text"):
            patch.setattr(jsonl_writer, name, full)
        lines.append({"step": 4, "epoch": 1.0})
        assert lines.remove_after(1) == 3
    assert "cannot remove the lines after step 1: No space left on device" in said[-1]
    lines.append({"step": 2, "epoch": 1.0, "loss": 7.0})
    assert [(row["step"], row["loss"]) for row in rows_of(lines.file)] == [(1, 1), (2, 7.0)]


def test_scores_that_cannot_be_added_are_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "encoder").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "checkpoints/latest").write_text("step-00000003\n")
    monkeypatch.setattr("sslkit.engine.logging.logger.append_text", full)
    with pytest.raises(UserError, match="the score cannot be added: No space left on device"):
        print_and_store(str(tmp_path), [EvaluationResult("knn", "x", {}, [Score("mine", 0.625)])], False)
    assert "62.50%" in capsys.readouterr().out
