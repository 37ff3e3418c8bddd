"""What a run shows in its first minute: a progress line of its first step, and answers to signals."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import small_recipe

import sslkit
from sslkit.engine.logging.progress_line import fit
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.resilience.preemption import StopRequest


def test_the_first_step_is_shown_without_a_line_of_metrics(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = sslkit.train(small_recipe(train={"log_every": 4}), tmp_path / "run")
    assert [row["step"] for row in run.metrics()] == [4, 6]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ETA ")]
    assert "img/s  epoch 0.02/1  loss " in lines[0]
    assert all(len(line) <= 80 for line in lines)


def test_a_line_holds_whole_parts_only() -> None:
    assert fit(["ETA 1h02m", "12 img/s", "epoch 1.00/5"], width=20) == "ETA 1h02m  12 img/s"
    assert fit(["ETA 1h02m", "12 img/s"], width=19) == "ETA 1h02m  12 img/s"


def test_the_slow_first_step_counts_only_while_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 13.0])
    monkeypatch.setattr("sslkit.engine.logging.throughput.time.monotonic", lambda: next(clock))
    meter = ThroughputMeter(batch_size=30)
    assert [meter.end_step() for _ in range(3)] == [3.0, 30.0, 20.0]


def test_the_time_left_contains_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 17.0, 18.0])  # a slow first step, two of 1 s, a pause of 6 s, a step of 1 s
    monkeypatch.setattr("sslkit.engine.logging.throughput.time.monotonic", lambda: next(clock))
    meter = ThroughputMeter(batch_size=30)
    for _ in range(3):
        meter.end_step()
    assert meter.seconds_left(20) == 20.0
    meter.restart()
    meter.end_step()
    assert meter.seconds_left(20) == 20 * (1.0 + 6.0 / 4)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "sslkit: finishing this step, then saving; press again to stop without saving\n"),
        (signal.SIGTERM, "sslkit: SIGTERM: finishing this step, then saving; a second signal stops without saving\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_is_answered_at_once_by_the_first_process(
    number: signal.Signals, said: str, rank: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    before = signal.signal(number, signal.default_int_handler)  # a background shell ignores SIGINT
    try:
        with StopRequest(0.0) as stop:
            stop.finishing = "this step"
            os.kill(os.getpid(), number)
            time.sleep(0)  # Python runs the handler
            assert stop.reason == number.name
            assert capfd.readouterr().err == (said if rank == "0" else "")
    finally:
        signal.signal(number, before)
