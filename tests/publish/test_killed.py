"""Commands that write, killed at every touch of the disk: nothing half-written is taken for whole, and the same command
again succeeds."""

import errno
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_recipe
from PIL import Image

import sslkit
from sslkit import report
from sslkit.cli import main
from sslkit.files import atomic as durable
from sslkit.publish import detectron2, encoder_folder, export, export_detectron2, export_encoder, import_checkpoint
from sslkit.publish import repository as hub
from sslkit.publish.importing import convert as importing
from sslkit.publish.repository import publish_run
from sslkit.report import pictures

TOUCHES = ("open", "os.", "shutil.", "ctypes.call_function")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    torch.save({"state_dict": official()}, folder / "weights.pth")
    return sslkit.train(small_recipe("moco_v2", "test_resnet", train={"max_steps": 1}), folder / "run").folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the proofs, which take most of the time, and let detectron2 have a ResNet that is none of its own."""
    monkeypatch.setattr(export, "_verify", lambda *_: {"features": (2, 3), "loads_in_timm": True})
    monkeypatch.setattr(importing, "check_reloaded", lambda *_, **__: None)
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)
    for name, value in (("_verify", None), ("_plain_twin", None), ("_readme", "page"), ("family", "resnet")):
        monkeypatch.setattr(detectron2, name, lambda *_, value=value: value)
    monkeypatch.setattr(detectron2, "detectron2_weights", lambda state: {"x": state["bn1.weight"].numpy()})


def killed_at(touch: int, folder: Path, work: Callable[[], Any]) -> bool:
    """Do the work in a process of its own, killed at its touch-th opening, renaming or removing in ``folder``."""
    child = os.fork()
    if not child:
        touches = itertools.count(1)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if not event.startswith(TOUCHES):
                return
            inside = any(str(folder) in os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | Path))
            if inside and next(touches) == touch:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_to(command: str, run: Path, out: Path) -> None:
    """One of the commands that make a folder."""
    if command == "export":
        export_encoder(run, out)
    elif command == "detectron2":
        export_detectron2(run, out)
    elif command == "import":
        import_checkpoint(run.parent / "weights.pth", out, "test_resnet")
    else:
        publish_run(out, "user/name", dry_run=True)


@pytest.mark.full
@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_a_new_folder_is_whole_or_not_there(tmp_path: Path, before: str) -> None:
    def fill(out: Path) -> None:
        with encoder_folder.new_folder(out) as aside:
            durable.write_text(aside / "one", "1")
            durable.write_text(aside / "two", "2")

    for touch in itertools.count(1):
        out = tmp_path / f"{touch}" / "deep" / "out"
        if before != "nothing":
            out.mkdir(parents=True)
        killed = killed_at(touch, tmp_path / f"{touch}", lambda out=out: fill(out))
        found = content(out) if out.exists() else {}
        assert found in ({}, {"one": b"1", "two": b"2"}), touch
        if not found:
            encoder_folder.check_empty(out, "export")  # the same command does not refuse it
            fill(out)
        assert content(out) == {"one": b"1", "two": b"2"}
        if not killed:
            break
    assert touch > 8
    assert [each.name for each in out.parent.iterdir()] == ["out"]


@pytest.mark.full
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", ["export", "detectron2", "import", "publish"])
def test_killed_and_given_again(command: str, run: Path, tmp_path: Path) -> None:
    """Each fifth touch; the same command then makes what it makes undisturbed."""

    def target(name: str) -> tuple[Path, Path]:
        """What the command is given, and the folder that it makes."""
        given = tmp_path / name / "out"
        given.parent.mkdir()
        if command == "publish":
            shutil.copytree(run, given)
        return given, given / "publish" if command == "publish" else given

    given, made = target("whole")
    write_to(command, run, given)
    whole = content(made)
    assert len(whole) >= 3
    for touch in itertools.count(1, 5):
        given, made = target(f"{touch}")
        killed = killed_at(touch, given.parent, lambda given=given: write_to(command, run, given))
        assert not made.exists() or content(made) == whole, touch
        if not made.exists() or command == "publish":
            write_to(command, run, given)
        assert content(made) == whole
        assert not list(made.parent.glob(".*"))
        shutil.rmtree(given.parent)
        if not killed:
            break
    assert touch > 9


def official() -> dict[str, torch.Tensor]:
    """A checkpoint as MoCo's official code names its tensors."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    return {f"module.encoder_q.{name}": value for name, value in state.items()} | {
        "module.encoder_q.fc.weight": torch.zeros(4, 4),
        "module.encoder_q.fc.bias": torch.zeros(4),
        "module.queue": torch.zeros(4, 4),
        "module.queue_ptr": torch.zeros(1),
    }


@pytest.mark.parametrize("what", ["page", "picture"])
def test_a_page_and_a_picture_are_the_old_or_the_new(what: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        if what == "picture":
            encoded = io.BytesIO()
            Image.new("RGB", (8, 8)).save(encoded, "PNG")
            pictures._write(folder / "pictures/curves.png", encoded)
        else:
            durable.write_output(folder / "report.html", "new" * 10**6)

    for touch in itertools.count(1):
        folder = tmp_path / f"{touch}"
        (folder / "pictures").mkdir(parents=True)
        file = folder / ("pictures/curves.png" if what == "picture" else "report.html")
        file.write_bytes(b"old")
        killed = killed_at(touch, folder, lambda folder=folder: write(folder))
        now = file.read_bytes()
        assert now == b"old" or (now == b"new" * 10**6 if what == "page" else now.endswith(b"IEND\xaeB`\x82")), touch
        write(folder)
        assert file.read_bytes() != b"old"
        assert not list(file.parent.glob(".*"))
        if not killed:
            break
    assert touch > 2


def words_of(command: str, run: Path, out: Path) -> list[str]:
    return {
        "export": ["export", str(run), str(out)],
        "detectron2": ["export", str(run), str(out), "--format", "detectron2"],
        "import": ["import", str(run.parent / "weights.pth"), str(out), "--backbone", "test_resnet"],
        "publish": ["publish", str(run), "--repo-id", "user/name", "--dry-run"],
        "report": ["report", str(run), "--no-gallery", "--output", str(out)],
    }[command]


@pytest.mark.full
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", ["export", "detectron2", "import", "publish", "report"])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No room for the first file, for the second, ... until there is room for all."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    torch.save({"state_dict": official()}, tmp_path / "weights.pth")
    out, write, write_bytes = tmp_path / "out", durable.write_file, Path.write_bytes
    made = run / "publish" if command == "publish" else out
    for room in itertools.count():
        written = [0]

        def full(file: Path, chunks: Any, room: int = room, written: list[int] = written) -> dict[str, Any]:
            if "pictures" in file.parts:  # they are extra
                return write(file, chunks)
            written[0] += 1
            if written[0] > room:
                write_bytes(file, b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
            return write(file, chunks)

        def full_page(file: Path, page: bytes, full: Any = full) -> int:
            return int(full(file, [page])["bytes"])

        with monkeypatch.context() as patch:
            for module in (durable, hub, detectron2):
                patch.setattr(module, "write_file", full)
            patch.setattr(Path, "write_bytes", full_page)
            with pytest.raises(SystemExit) as ended:
                main(words_of(command, run, out))
        error = capsys.readouterr().err
        if not ended.value.code:
            break
        assert (ended.value.code, error.count("\n")) == (2, 1), error
        assert "cannot be written: No space left on device" in error
        assert not made.exists()
        assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "weights.pth"]
    assert room >= (1 if command == "report" else 3)
    assert made.exists()


@pytest.mark.usefixtures("quick")
def test_a_run_on_a_read_only_disk_is_published_and_shown_from_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, access, mkdir = content(run), os.access, os.mkdir

    def refuse(path: Any, *arguments: Any) -> None:
        if Path(path).is_relative_to(run):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != run)
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for command in ("publish", "report"):
        with pytest.raises(SystemExit) as ended:
            main(words_of(command, run, tmp_path / "page.html"))
        assert ended.value.code == 0
    assert content(run) == before
    [folder] = tmp_path.glob("sslkit-*/publish")
    assert {"config.json", "model.safetensors", "README.md", "SHA256SUMS"} <= content(folder).keys()
    said = capsys.readouterr()
    assert f"{folder} is ready; nothing was sent" in said.out
    assert (tmp_path / "page.html").is_file()
    assert "pictures/curves.png: cannot be written: Read-only file system" in said.err


@pytest.mark.parametrize("what", ["page", "picture"])
def test_two_processes_write_one_page_at_once(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes the same file just before this one puts its own in place."""
    file = tmp_path / "x[1].html"

    def write(content: str) -> None:
        if what == "page":
            durable.write_output(file, content)
        else:
            durable.replace_file(file, [content.encode()], shared=True)

    replace, others = os.replace, []

    def late(aside: Path, final: Path) -> None:
        if not others:
            others.append(os.fork())
            if not others[0]:
                write("other")
                os._exit(0)
            assert os.waitpid(others[0], 0)[1] == 0
            assert file.read_text() == "other"
        replace(aside, final)

    monkeypatch.setattr(os, "replace", late)
    write("mine")
    assert file.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
