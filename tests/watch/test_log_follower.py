"""A file that grows, is cut, rewritten and replaced under the reader: every whole line once, whatever the pieces."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from sslkit.errors import UserError
from sslkit.files import jsonl_reader
from sslkit.files.jsonl_reader import LogFollower
from sslkit.files.jsonl_writer import append_text, remove_after
from sslkit.watch.terminal_curve import ASCII_BARS, MAX_POINTS, Curve, sparkline


def drain(reader: LogFollower) -> list[int]:
    steps, more = [], True
    while more:
        news = reader.read()
        steps += [row["step"] for row in news.rows]
        more = news.more
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_every_whole_line_once_in_whatever_pieces_it_comes(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_reader, "CHUNK", 256)
    draw, file = random.Random(seed), tmp_path / "log.jsonl"
    text = b"".join(json.dumps({"step": step, "x": "é" * draw.randrange(30)}).encode() + b"\n" for step in range(200))
    reader, steps, written = LogFollower(file), [], 0
    assert drain(reader) == []
    with file.open("ab", buffering=0) as stream:
        while written < len(text):
            piece = draw.randrange(1, 700)
            stream.write(text[written : written + piece])
            written += piece
            steps += drain(reader)
            assert len(steps) == text[:written].count(b"\n")
    assert steps == list(range(200))


def test_a_line_torn_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    reader = LogFollower(file)
    assert drain(reader) == [1]
    append_text(file, '{"step": 2}\n[3]\nnothing\n')
    assert drain(reader) == [2]


def test_a_run_that_goes_back_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    append_text(file, "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9)))
    reader = LogFollower(file)
    assert drain(reader) == [1, 2, 3, 4, 5, 6, 7, 8]
    remove_after(file, 5)
    append_text(file, "".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(6, 9)))
    news = reader.read()  # of the very same length as before
    assert news.restarted
    assert [(row["step"], row["loss"]) for row in news.rows[4:]] == [(5, 1.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    with file.open("r+") as stream:  # the same file, written over in place
        stream.write('{"step": 71}\n')
        stream.truncate()
    news = reader.read()
    assert news.restarted
    assert [row["step"] for row in news.rows] == [71]
    file.unlink()
    assert reader.read().restarted
    assert not reader.read().restarted


def test_a_line_longer_than_any_of_ours_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_reader, "CHUNK", 256)
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n' + json.dumps({"step": 2, "x": "y" * 2000}) + '\n{"step": 3}\n')
    assert drain(LogFollower(file)) == [1, 3]


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_is_refused_and_hangs_nobody(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read"):
        LogFollower(file).read()


def test_a_curve_keeps_little_and_stays_true() -> None:
    values = np.random.default_rng(0).normal(size=100_003).cumsum()
    curve = Curve()
    for value in values.tolist():
        curve.add(value)
    assert len(curve.means) < MAX_POINTS
    assert (curve.newest, curve.lowest, curve.highest) == (values[-1], values.min(), values.max())
    points = curve.points(80)
    assert len(points) == 80
    assert points == pytest.approx([part.mean() for part in np.array_split(values, 80)], abs=0.02 * np.ptp(values))
    curve.add(None)
    curve.add(float("nan"))
    assert curve.newest is None
    assert curve.points(80) == points


def test_few_points_are_shown_as_they_are() -> None:
    curve = Curve()
    assert sparkline(curve.points(10)) == ""
    for value in (0.0, 7.0, 3.0):
        curve.add(value)
    assert sparkline(curve.points(10)) == "▁█▄"
    assert sparkline(curve.points(10), ASCII_BARS) == "_@="
    assert len(set(sparkline([2.0, 2.0, 2.0]))) == 1
