"""Bad input under a launcher: one process says it, and the launcher's own summary ends with it."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from launching import finish, pretrain, start
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sslkit.cli import launcher_exit as launched
from sslkit.cli import main
from sslkit.cli.launcher_exit import is_printed_by_first, leave_for_launcher


def place(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a process, where torchrun has it."""
    file = folder / "attempt_0" / str(rank) / "error.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return file


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "TIMEOUT", 0.5)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process they stay


def summary_of(*files: Path) -> str:
    """As PyTorch's launcher prints it."""
    failures = {rank: ProcessFailure(rank, 100 + rank, 2, str(file)) for rank, file in enumerate(files)}
    return str(ChildFailedError("sslkit.pretrain", failures))


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["recipes", "show", "nothing"], 2, "sslkit: nothing: no such file"),
        (["pretrain", "--colour"], 2, "sslkit: No such option: --colour"),
    ],
)
def test_pytorchs_summary_ends_with_the_sentence(
    words: list[str], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place(tmp_path, 0, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code
    root_cause = summary_of(file).partition("Root Cause")[2]
    assert sentence in root_cause
    assert "Traceback" not in root_cause


def test_a_fault_of_ours_leaves_its_message_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = place(tmp_path, 0, monkeypatch)

    def fail(_name: str, _overrides: list[str] | None = None) -> None:
        raise KeyError("hf_" + "aB3dE6gH9jK2mN5pQ8sTxYzUvWqRtSaBcD")

    monkeypatch.setattr("sslkit.recipe.resolve.load_recipe", fail)
    with pytest.raises(KeyError):
        main(["recipes", "show", "quickstart"])
    assert "sslkit: KeyError: '[token]'" in summary_of(file)


def test_the_others_are_silent_if_the_first_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, 0, monkeypatch)
    leave_for_launcher("sslkit: the same")
    assert not is_printed_by_first("sslkit: the same")  # it is the first
    place(tmp_path, 1, monkeypatch)
    assert is_printed_by_first("sslkit: the same")
    assert not is_printed_by_first("sslkit: another")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    leave_for_launcher("nobody asks")
    assert not is_printed_by_first("sslkit: the same")


def test_one_that_is_earlier_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place(tmp_path, 0, monkeypatch)
    place(tmp_path, 1, monkeypatch)
    message = json.dumps({"message": {"message": "sslkit: late", "extraInfo": {"timestamp": "1"}}})
    threading.Timer(0.3, lambda: first.write_text(message)).start()
    assert is_printed_by_first("sslkit: late")


def test_one_that_alone_has_the_fault_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place(tmp_path, 1, monkeypatch)
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "show", "nothing"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("sslkit: nothing: no such file")
    assert time.monotonic() - started < 5


@pytest.mark.full
def test_two_processes_say_a_bad_recipe_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[method]\nname = "simclrr"\n[backbone]\nname = "x"\n[data]\npath = "x"\n')
    process = start(pretrain(tmp_path / "recipe.toml", tmp_path / "run"), processes=2)
    printed, _, summary = finish(process, timeout=120).partition("FAILED")
    assert process.returncode == 1  # the launcher's own
    sentence = "[method] name: unknown method 'simclrr'; did you mean 'simclr'?"
    assert printed.count(sentence) == 1
    assert sentence in summary.partition("Root Cause")[2]
    assert set(re.findall(r"exitcode  : (-?\d+)", summary)) == {"2"}
    assert not (tmp_path / "run").exists()
