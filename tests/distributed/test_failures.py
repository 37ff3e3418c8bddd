"""Which process is blamed, and what NCCL's errors are translated to."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import small_recipe
from torch.distributed import HashStore

from sslkit.cli import main
from sslkit.distributed import failures
from sslkit.distributed import heartbeat as heartbeat_module
from sslkit.distributed.failures import describe_failure, explain_nccl, find_problem, group_timeout, is_others_fault
from sslkit.distributed.heartbeat import Heartbeat
from sslkit.engine import loop, trainer
from sslkit.errors import RunError, UserError
from sslkit.recipe.resolve import Recipe

TRAINING, LOADING, WAITING = "in forward and backward", "waiting for data", "in the collective gather_rows"
DIST_BACKEND = (
    "[PG ID 0 PG GUID 0(default_pg) Rank 1] NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
)


def beat(count: int, step: int, doing: str) -> dict[str, Any]:
    return {"count": count, "step": step, "doing": doing}


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {}, "process 3 has sent no heartbeat"),
        (beat(7, 5, TRAINING), beat(7, 5, TRAINING), "process 3 is dead or frozen; its last heartbeat was at step 5, "),
        (beat(7, 5, WAITING), beat(7, 5, WAITING), "process 3 is dead or frozen"),
        (beat(7, 5, TRAINING), beat(8, 5, "stopped by ValueError: x"), "process 3 stopped by ValueError: x at step 5"),
        (beat(7, 4, TRAINING), beat(9, 4, TRAINING), "process 3 is alive at step 4, in forward and backward"),
        (beat(7, 4, WAITING), beat(9, 4, WAITING), "process 3 is alive at step 4"),  # behind
        (beat(7, 5, LOADING), beat(9, 5, LOADING), "process 3 is alive at step 5, waiting for data"),
        (beat(7, 5, WAITING), beat(9, 5, WAITING), ""),
        (beat(7, 5, TRAINING), beat(9, 5, "timed out waiting for others"), ""),
    ],
)
def test_who_is_blamed(before: dict[str, Any], after: dict[str, Any], words: str, blocking: bool) -> None:
    found = find_problem(3, before, after, {"step": 5, "doing": TRAINING}, blocking=blocking)
    assert found.startswith(words)
    assert bool(found) == bool(words)


@pytest.mark.parametrize("doing", [TRAINING, "in bookkeeping", "evaluating"])
@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_process_at_the_same_step_or_ahead_is_blamed_under_gloo_only(doing: str, step: int) -> None:
    """Under gloo it would know which collective it waits in; under NCCL it waits wherever it reads a result."""
    beats = beat(7, step, doing), beat(9, step, doing)
    own = {"step": 5, "doing": TRAINING}
    assert find_problem(3, *beats, own, blocking=True) == f"process 3 is alive at step {step}, {doing}"
    assert find_problem(3, *beats, own, blocking=False) == ""


def test_who_loads_as_long_as_this_process_is_not_blamed() -> None:
    assert find_problem(3, beat(7, 5, LOADING), beat(9, 5, LOADING), beat(0, 5, LOADING), blocking=False) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7", "NCCL_SOCKET_IFNAME"),
        ("unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7", "Xid errors in `dmesg`"),
        ("remote process exited or there was a network error, NCCL version 2.30.7", "another process has ended"),
        ("internal error - please report this issue to the NCCL developers", "versions differ"),
        ("invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.30.7", "one process for each GPU"),
        (
            "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.30.7\nncclInvalidUsage: This usually "
            "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on "
            "CUDA device 1b000",
            "two processes use one GPU",
        ),
        (
            "unhandled system error (run with NCCL_DEBUG=INFO for details)\nncclSystemError: System call (e.g. socket, "
            "malloc) or external library call failed or device error. \nLast error:\nError while creating shared "
            "memory segment /dev/shm/nccl-x1 (size 9637888), error: No space left on device (28)",
            "--shm-size=8g",
        ),
        ("unhandled cuda error\nLast error:\nCuda failure 'out of memory'", "micro_batch"),
        ("something new", "a collective failed: "),
    ],
)
def test_errors_of_nccl_are_one_sentence(text: str, words: str) -> None:
    error = dist.DistBackendError(f"{DIST_BACKEND}{text}")
    assert is_others_fault(error)
    found = describe_failure(error)
    assert found.startswith("NCCL: ")
    assert words in found
    assert "NCCL_DEBUG=INFO" in found
    assert "\n" not in found
    with pytest.raises(RunError, match=r"the processes cannot exchange data\. NCCL: "), explain_nccl():
        raise error


def test_a_run_that_nccl_ends_says_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_recipe: Recipe) -> None:
        raise dist.DistBackendError(f"{DIST_BACKEND}unhandled system error (run with NCCL_DEBUG=INFO for details)")

    monkeypatch.setattr(trainer, "make_accelerator", fails)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(small_recipe().to_toml())
    with pytest.raises(SystemExit) as left:
        main(["pretrain", str(recipe), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("sslkit: the processes cannot exchange data. NCCL: a system call of NCCL failed: ")
    assert said.count("\n") == 1


def test_the_loop_uses_the_activities_that_are_compared() -> None:
    text = Path(loop.__file__).read_text()
    for activity, name in ((failures.TRAINING, "TRAINING"), (failures.LOADING, "LOADING")):
        assert f'"{activity}"' in text or name in text


def test_errors_of_the_watchdog_are_known() -> None:
    error = RuntimeError(
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=660000) ran for 660012 milliseconds before timing out."
    )
    assert is_others_fault(error)
    assert "a collective took too long" in describe_failure(error)


def test_other_errors_are_left_alone() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    assert is_others_fault(gloo)
    assert describe_failure(gloo).endswith("Connection closed by peer [127.0.0.1]:1")
    for error in (gloo, RuntimeError("CUDA error: an illegal memory access was encountered"), UserError("NCCL")):
        with pytest.raises(type(error)) as raised, explain_nccl():
            raise error
        assert raised.value is error
    assert not is_others_fault(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_nccl_waits_longer_than_the_heartbeat() -> None:
    """The heartbeat ends a process 5 s after the timeout, and reads others' heartbeats for 2.5 s before it does."""
    assert group_timeout(600.0, on_gpu=False) == timedelta(seconds=600)
    assert group_timeout(600.0, on_gpu=True) > timedelta(seconds=600 + 5 + 2.5)


def heartbeat_of(store: HashStore, monkeypatch: pytest.MonkeyPatch, timeout: float = 60.0) -> Heartbeat:
    """That of process 0 of two, with a store in this process, as under NCCL."""
    monkeypatch.setattr(heartbeat_module, "world_size", lambda: 2)
    monkeypatch.setattr(heartbeat_module, "INTERVAL", 0.02)
    monkeypatch.setattr(heartbeat_module, "GRACE", 0.05)
    heartbeat = Heartbeat(timeout)
    heartbeat.store, heartbeat.blocking = store, False
    return heartbeat


def test_a_process_that_hangs_on_the_device_ends_once_another_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    heartbeat = heartbeat_of(store, monkeypatch)
    heartbeat.at(7, TRAINING)
    heartbeat._send(TRAINING)
    assert not heartbeat._must_end()
    store.set("beat/1", json.dumps(beat(3, 5, "stopped by OutOfMemoryError: out of GPU memory")))
    store.set("one has stopped", "")
    heartbeat._send(TRAINING)
    assert not heartbeat._must_end()  # gloo's error may come yet
    time.sleep(0.06)
    assert heartbeat._must_end()
    heartbeat.at(7, "saving")
    assert not heartbeat._must_end()  # what is being saved is saved
    blamed = str(heartbeat.blame())
    assert "process 1 stopped by OutOfMemoryError: out of GPU memory at step 5" in blamed


def test_equal_steps_under_nccl_blame_the_device_or_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    heartbeat = heartbeat_of(store, monkeypatch)
    heartbeat.at(7, "in bookkeeping")
    numbers = iter(range(100))
    monkeypatch.setattr(heartbeat, "_read_beats", lambda: [{}, beat(next(numbers), 7, "in bookkeeping")])
    said = str(heartbeat.blame())
    assert said.startswith("process 0 cannot continue at step 7, in bookkeeping: no process is dead or behind, so the")
    assert "Xid" in said
    assert "process 1" not in said


def test_a_failure_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    heartbeat = heartbeat_of(store, monkeypatch)
    heartbeat.thread.start()
    heartbeat.__exit__(ValueError, ValueError("out of luck"), None)
    assert store.check(["one has stopped"])
    assert json.loads(store.get("beat/0"))["doing"] == "stopped by ValueError: out of luck"
    assert not heartbeat.thread.is_alive()
