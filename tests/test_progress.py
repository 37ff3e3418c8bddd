"""Progress of long work: shown only when asked for, on standard error, with what is left."""

import pytest

from sslkit import progress
from sslkit.progress import Stage, group, show_stages, show_with, stage, track


def test_stages_are_silent_unless_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "work", "item")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_display_sees_each_move_and_the_end() -> None:
    seen: list[tuple[str, int, bool]] = []
    shown = show_with(lambda each: seen.append((each.what, each.done, each.ended)))
    with shown, group("raw pixels"), stage("features", 6, "image") as advance:
        advance(4)
        advance(2)
    name = "raw pixels: features"
    assert seen == [(name, 0, False), (name, 4, False), (name, 6, False), (name, 6, True)]


def test_without_a_terminal_lines_go_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    with show_stages():
        assert list(track(range(2), "work", "item")) == [0, 1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "sslkit: work: 0 of 2 items\n"  # the next one is due seconds later
    monkeypatch.setenv("RANK", "1")
    with show_stages():
        list(track(range(2), "work", "item"))
    assert capsys.readouterr().err == ""


def test_the_time_left_is_at_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit.progress.time.monotonic", lambda: 130.0)
    assert str(Stage("features", 40, "image", done=10, started=100.0)) == "features: 10 of 40 images, 1m30s left"
