"""The commands that a planned run prints: pasted, they train on from its checkpoint with its own recipe."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import cli_error, run

from sslkit.engine.run_folder.layout import Run
from sslkit.recipe.resolve import load_recipe


def pasted(capsys: pytest.CaptureFixture[str], text: str) -> str:
    """Run the ``sslkit pretrain`` command in a text, and return what it prints."""
    found = re.search(r"sslkit (pretrain .*--(?:resume|output|set) \S+)", text)
    assert found, text
    code, out, err = run(capsys, *shlex.split(found[1]))
    assert code == 0, err
    return out


@pytest.fixture
def planned(
    capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command of a planned run of 2 epochs of a step, after it was run in a folder with copies of the images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(class_folders, "pictures")
    words = ["pretrain", "--data", "pictures", "--backbone", "test_resnet", "--set", "data.workers=0"]
    monkeypatch.setattr("sslkit.plan.make_plan.profile", lambda *_args, **_kwargs: SimpleNamespace(step=0.1))
    monkeypatch.setattr("sslkit.plan.rules.MAX_EPOCHS", {10_000: 2})
    code, _, err = run(capsys, *words)
    assert code == 0, err
    return words


def test_each_printed_command_trains_on_when_pasted(
    capsys: pytest.CaptureFixture[str], planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_recipe("runs/pictures/recipe.toml")
    # A new plan would now have another length, and with it another half-life of the teacher.
    monkeypatch.setattr("sslkit.plan.rules.MAX_EPOCHS", {10_000: 400})
    longer = cli_error([*planned, "--set", "train.epochs=3"])
    said = pasted(capsys, longer)
    assert "recipe: that of runs/pictures, not a new plan, with backbone.name, data.path, data.workers and" in said
    assert [row["step"] for row in Run(Path("runs/pictures-2"), 1).metrics()] == [3]
    code, out, _ = run(capsys, *planned)
    assert code == 0
    pasted(capsys, out)
    assert "twice as long" in out
    assert [row["step"] for row in Run(Path("runs/pictures-3"), 1).metrics()] == [3, 4]
    more = sorted(Path("pictures").rglob("*.png"))
    for file in more[:30]:
        shutil.copy(file, file.with_name(f"added_{file.name}"))
    code, out, _ = run(capsys, *planned)
    assert code == 0
    assert "30 images were added" in out
    pasted(capsys, next(line for line in out.splitlines() if "to train on them too" in line))
    added = load_recipe("runs/pictures-4/recipe.toml")
    assert Run(Path("runs/pictures-4"), 1).metrics()[-1]["step"] == 4
    assert added.method == first.method
    assert added.train == first.train  # 2 epochs, now of 2 steps


def test_a_checkpoint_names_its_recipe_too(capsys: pytest.CaptureFixture[str], planned: list[str]) -> None:
    step = "runs/pictures/checkpoints/step-00000002"
    shutil.copytree(step, "copy")
    for resume, output in ((step, "a"), ("runs/pictures/checkpoints", "b"), ("copy", "c")):
        words = [*planned, "--set", "train.epochs=3", "--resume", resume, "--output", output]
        code, out, err = run(capsys, *words, "--hours", "1")
        assert code == 0, err
        assert "3 epochs; --hours has no effect" in out
        assert [row["step"] for row in Run(Path(output), 1).metrics()] == [3]
    assert "has no checkpoint" in cli_error([*planned, "--resume", "pictures", "--output", "d"])
    assert "such as --output runs/longer" in cli_error(["pretrain", "--resume", "runs/pictures"])
    other = [*planned, "--resume", "runs/pictures", "--output", "d"]
    assert "was trained with moco_v2, not byol; to start anew" in cli_error([*other, "--method", "byol"])
    assert "was trained by another recipe" in cli_error([*other, "--set", "method.dim=64"])
    assert not Path("d").exists()
