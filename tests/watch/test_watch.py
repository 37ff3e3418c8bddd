"""``sslkit watch`` beside real runs: how they are, in any terminal, and without a trace."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import cli_error, small_recipe
from rich.console import Console

import sslkit
from sslkit.engine.run_folder import lock
from sslkit.files import jsonl_reader
from sslkit.files.run_reader import RunReader
from sslkit.watch import run_state as state
from sslkit.watch import watch
from sslkit.watch.terminal_page import Page
from sslkit.watch.watched_run import WatchedRun

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch") / "run"
    monitor = {"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 100, "diagnose_every": 3}
    sslkit.train(small_recipe(train={"max_steps": 8}, monitor=monitor), folder)
    return folder


def start(words: list[str], output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-m", "sslkit", *words],
        stdin=output,
        stdout=output,
        stderr=output,
        env=environment,
        # A shell ignores SIGINT in what it starts in the background, tests among it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def page(folder: Path, width: int = 80, height: int = 40, **options: object) -> str:
    run = WatchedRun(folder)
    while run.read_new():
        pass
    stream = io.StringIO()
    Console(file=stream, width=width, height=height, **options).print(Page(run))  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.slow
def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    """Waiting, running, stopped on request, killed, done; what it logs is what is shown."""
    folder = tmp_path / "run"
    run = WatchedRun(folder)
    run.read_new()
    assert run.state.name == "waiting"
    file = tmp_path / "recipe.toml"
    recipe = small_recipe("moco_v2", "test_resnet", train={"max_steps": 0, "batch_size": 8}, checkpoint={"keep": 1})
    file.write_text(recipe.to_toml())
    words = ["pretrain", str(file), "--output", str(folder)]

    def reaches(word: str, step: int = 0) -> bool:
        run.read_new()
        return run.state.name == word and run.step >= step

    for ending, word in ((signal.SIGTERM, "stopped"), (signal.SIGKILL, "killed")):
        process = start(words)
        try:
            before = run.step
            until(lambda: reaches("running", before + 3))  # noqa: B023
            assert run.state.message == f"process {process.pid} on {os.uname().nodename}"
            assert run.last_step == 250
            assert run.seconds_left is not None
        finally:
            process.send_signal(ending)
            process.wait()
        run.read_new()
        assert run.state.name == word
        assert "the same command continues" in run.state.message
    process = start([*words, "--set", "train.max_steps=30"])
    assert process.wait() == 0
    run.read_new()
    assert run.state.name in ("done", "stopped")
    rows = sslkit.Run(folder, 0).metrics()
    assert run.step == rows[-1]["step"]
    assert run.metrics["loss"].newest == rows[-1]["loss"]
    assert sum(1 for _ in rows) == run.metrics["loss"].interval * len(run.metrics["loss"].means)


HOLDER = """
import fcntl, json, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(file, json.dumps({"pid": os.getpid(), "host": "here"}).encode())
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_that_is_held_and_one_that_was_left_behind(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    run = RunReader(tmp_path)
    assert state.state_of(run, 3, 10, 2.0).name == "ended"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert state.state_of(run, 0, 10, 0.0).name == "starting"
        assert state.state_of(run, 3, 10, 0.0) == state.State("running", f"process {process.pid} on here")
        os.utime(tmp_path / ".lock", (time.time() - 300, time.time() - 300))
        assert state.state_of(run, 3, 10, 30.0).name == "running"  # twenty of its lines take ten minutes
        silent = state.state_of(run, 3, 10, 2.0)
        assert silent.name == "silent"
        assert "has written nothing for 5m00s (usually every 2s)" in silent.message
    finally:
        process.kill()
        process.wait()
    killed = state.state_of(run, 3, 10, 2.0)
    assert killed.name == "killed"
    assert "was killed" in killed.message
    with lock.hold_folder(tmp_path):  # which nobody has been kept from
        pass
    assert state.state_of(run, 3, 10, 2.0).name == "ended"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_terminal_shows_the_newest_numbers(trained: Path, width: int) -> None:
    rows, results = sslkit.Run(trained, 8).metrics(), sslkit.Run(trained, 8).results()
    lines = page(trained, width).splitlines()
    assert max(map(len, lines)) <= width
    found = {line.split()[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    assert found["loss"] == f"{rows[-1]['loss']:.4g}"
    assert found["kNN"] == f"{results[-1]['accuracy']:.1%}"
    assert found["lr"] == f"{rows[-1]['lr']:.4g}"
    assert "done: " in "\n".join(lines)
    if width == 80:
        assert "step 8/8 (100%)" in "\n".join(lines)
        losses = [row["loss"] for row in rows]
        shown = next(line for line in lines if line.startswith("loss "))
        assert f"{min(losses):.4g} to {max(losses):.4g}" in shown
        bars = shown.split()[2]
        assert len(bars) == 8
        assert bars[losses.index(max(losses))] == "█"
        assert bars[losses.index(min(losses))] == "▁"


def test_a_low_or_plain_terminal(trained: Path) -> None:
    assert "\x1b[" not in page(trained, force_terminal=True, no_color=True, color_system=None)
    assert "\x1b[" in page(trained, force_terminal=True, color_system="truecolor")
    low = page(trained, height=8, force_terminal=True, color_system=None).splitlines()
    assert len(low) <= 8
    assert any(line.startswith("loss") for line in low)


def test_what_a_run_folder_says_moves_no_cursor(trained: Path, tmp_path: Path) -> None:
    evil = "\x1b[2J\x07[bold]x[/bold]"
    (tmp_path / "recipe.toml").write_text((trained / "recipe.toml").read_text())
    (tmp_path / "PREEMPTED").write_text(f"step 3: {evil}\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "epoch": 0.1, "loss": None, evil: 1.0}) + "\n")
    alarms = [f"collapse: {evil}"]
    (tmp_path / "diagnostics.jsonl").write_text(
        json.dumps({"step": 2, "alarms": ["spike: one"]}) + "\n" + json.dumps({"step": 3, "alarms": alarms}) + "\n"
    )
    (tmp_path / "results.jsonl").write_text(json.dumps({"step": 3, "by": "eval", "evaluation": evil, "accuracy": 0.5}))
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write("\n")
    shown = page(tmp_path, 160)
    assert not {"\x1b", "\x07"} & set(shown)
    assert r"ALARM collapse: \u001b[2J\u0007[bold]x[/bold]" in shown
    assert "alarms that are no longer active: spike" in shown
    assert "not finite in the newest line: loss" in shown
    assert "50.00% at step 3" in shown


def test_watching_leaves_no_trace_and_needs_no_torch(trained: Path) -> None:
    def trace() -> dict[str, tuple[int, int, int]]:
        found = [trained, *trained.rglob("*")]
        return {str(path): (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    before = trace()
    program = f"import sys; from sslkit.cli import main\ntry: main(['watch', {str(trained)!r}])\nfinally: "
    program += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "done: all 8 steps done and saved" in told
    assert told.splitlines()[-1] == "False False"
    assert trace() == before


def test_refusals_are_one_sentence(tmp_path: Path, class_folders: Path) -> None:
    assert "no run here yet" in cli_error(["watch", str(tmp_path / "nowhere"), "--once"])
    assert "not a run folder" in cli_error(["watch", str(class_folders), "--once"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("[method\n")
    assert "not a readable TOML file" in cli_error(["watch", str(tmp_path / "run"), "--once"])


def test_a_run_that_is_just_beginning_is_waited_for(tmp_path: Path) -> None:
    """Its recipe is the last thing that is written at the start."""
    run = WatchedRun(tmp_path)
    for name in (".lock", "checkpoints", ".recipe.tmp", "data.json", "images.parquet"):
        (tmp_path / name).touch()
        run.read_new()
    (tmp_path / ".lock").unlink()
    with pytest.raises(sslkit.UserError, match="not a run folder"):
        run.read_new()


def test_a_run_folder_that_vanishes(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text((trained / "recipe.toml").read_text())
    run = WatchedRun(folder)
    run.read_new()
    (folder / "recipe.toml").unlink()
    folder.rmdir()
    with pytest.raises(sslkit.UserError, match="was removed or renamed"):
        run.read_new()


class Terminal:
    """A terminal with ``sslkit watch`` in it."""

    def __init__(self, folder: Path) -> None:
        self.ours, theirs = pty.openpty()
        self.process = start(["watch", str(folder)], theirs)
        os.close(theirs)
        self.text = ""

    def shows(self, words: str) -> bool:
        try:
            while select.select([self.ours], [], [], 0.0)[0]:
                self.text += os.read(self.ours, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            pass
        return words in self.text


@pytest.mark.full
def test_opened_before_the_run_and_closed_at_any_time(tmp_path: Path) -> None:
    """One watcher leaves by Ctrl-C while the run goes on, another stays until it is done; both exit with 0."""
    folder = tmp_path / "run"
    leaves, stays = Terminal(folder), Terminal(folder)
    until(lambda: leaves.shows("no run here yet") and stays.shows("no run here yet"))
    file = tmp_path / "recipe.toml"
    file.write_text(small_recipe("moco_v2", "test_resnet", train={"max_steps": 0, "batch_size": 20}).to_toml())
    run = start(["pretrain", str(file), "--output", str(folder)])
    try:
        until(lambda: leaves.shows("running: ") and leaves.shows("loss") and not stays.shows("sslkit: "), 120)
        leaves.process.send_signal(signal.SIGINT)
        assert leaves.process.wait(20) == 0
        assert not leaves.shows("Traceback")
        assert run.wait(120) == 0
        until(lambda: stays.shows("all 100 steps done and saved"))
        assert stays.process.wait(20) == 0
    finally:
        for process in (run, leaves.process, stays.process):
            if process.poll() is None:
                process.kill()


def test_a_long_file_is_read_to_its_end(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((trained / "recipe.toml").read_text())
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        for step in range(1, 60_001):
            stream.write(json.dumps({"step": step, "epoch": step / 62, "loss": 5 - step / 60_000, "lr": 0.1}) + "\n")
    run = WatchedRun(tmp_path)
    looks = 1
    while run.read_new():
        looks += 1
    assert looks == -(-(tmp_path / "metrics.jsonl").stat().st_size // jsonl_reader.CHUNK)
    assert run.step == 60_000
    loss = run.metrics["loss"]
    assert loss.points(3) == pytest.approx([5 - 1 / 6, 4.5, 4 + 1 / 6], abs=0.01)
    assert (loss.newest, len(loss.means) < 1024) == (4.0, True)
    printed = io.StringIO()
    watch(tmp_path, Console(file=printed, width=80), once=True)
    assert "step 60000" in printed.getvalue()
