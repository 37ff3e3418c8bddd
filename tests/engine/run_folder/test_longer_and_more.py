"""A finished run that is extended, and images that are added: one command each, and what it does."""

import math
from pathlib import Path

import pytest
import torch
from conftest import cli_error, small_recipe
from PIL import Image
from safetensors.torch import load_file

import sslkit
from sslkit.command_line import free_folder, running, same_command
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe


def write(images: Path, start: int, stop: int) -> None:
    """Real pictures as files."""
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    images.mkdir(exist_ok=True)
    for index in range(start, stop):
        Image.fromarray(source.read(index)).save(images / f"{index:03d}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write(tmp_path / "images", 0, 32)
    return tmp_path / "images"


def recipe_of(images: Path, epochs: int, decay: str = "cosine", method: str = "moco_v2") -> Recipe:
    """Four steps an epoch."""
    return small_recipe(
        method,
        "test_resnet",
        data={"path": str(images), "split": "train"},
        train={"epochs": epochs, "batch_size": 8, "max_steps": 0},
        schedule={"decay": decay, "per": "step"},
    )


def test_an_extended_run_follows_the_longer_schedule_from_its_step(images: Path, tmp_path: Path) -> None:
    sslkit.train(recipe_of(images, 1), tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run of 1 epoch.*sslkit.train\(recipe, '.*run-2', resume='.*run'\)"):
        sslkit.train(recipe_of(images, 2), tmp_path / "run")
    longer = sslkit.train(recipe_of(images, 2), tmp_path / "run-2", resume=str(tmp_path / "run"))
    rows = longer.metrics()
    assert [row["step"] for row in rows] == [5, 6, 7, 8]
    peak = recipe_of(images, 2).peak_lr
    expected = [peak * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(4, 8)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    # The same command again continues the new run, and does not start over.
    assert sslkit.train(recipe_of(images, 2), tmp_path / "run-2", resume=str(tmp_path / "run")).metrics() == rows


def test_with_a_constant_schedule_it_ends_as_a_run_that_was_as_long_from_the_start(
    images: Path, tmp_path: Path
) -> None:
    whole = sslkit.train(recipe_of(images, 2, "constant"), tmp_path / "whole")
    sslkit.train(recipe_of(images, 1, "constant"), tmp_path / "run")
    longer = sslkit.train(recipe_of(images, 2, "constant"), tmp_path / "longer", resume=str(tmp_path / "run"))
    one, other = (load_file(each.folder / "checkpoints/step-00000008/model.safetensors") for each in (whole, longer))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["loss"] for row in whole.metrics()[4:]] == [row["loss"] for row in longer.metrics()]


def test_a_start_without_a_step_left_names_the_epochs_that_fit(images: Path, tmp_path: Path) -> None:
    sslkit.train(recipe_of(images, 1), tmp_path / "run")
    with pytest.raises(UserError, match=r"is of step 4, and 1 epoch of 4 steps end there.*set train\.epochs=2"):
        sslkit.train(recipe_of(images, 1), tmp_path / "new", resume=str(tmp_path / "run"))
    assert not (tmp_path / "new").exists()


def test_added_images_are_ignored_until_the_command_that_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    write(images, 0, 16)
    recipe = recipe_of(images, 2)
    sslkit.train(recipe, tmp_path / "run")
    write(images, 16, 32)
    (images / "031.png").write_bytes(b"no image")
    assert sslkit.train(recipe, tmp_path / "run").step == 4
    said = capsys.readouterr().out
    assert "16 images were added after this run started and are ignored" in said
    assert f"new folder: sslkit.train(recipe, '{tmp_path}/run-2', resume='{tmp_path}/run')" in said
    more = sslkit.train(recipe, tmp_path / "run-2", resume=str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "counts as the first 4 of 8 steps: epoch 1 of 2 on these images" in said
    # A whole epoch of the 32 images is left: 4 steps, and every image is met, the unreadable one too.
    assert [(row["step"], row["epoch"]) for row in more.metrics()] == [(5, 1.25), (6, 1.5), (7, 1.75), (8, 2.0)]
    assert "031.png" in (tmp_path / "run-2/bad_samples.jsonl").read_text()


def test_a_memory_bank_cannot_go_on_with_other_images(images: Path, tmp_path: Path) -> None:
    sslkit.train(recipe_of(images, 1, method="instdisc"), tmp_path / "run")
    write(images, 32, 48)
    with pytest.raises(UserError, match=r"memory bank of 32 images, and the data has 48.*without --resume"):
        sslkit.train(recipe_of(images, 2, method="instdisc"), tmp_path / "more", resume=str(tmp_path / "run"))


def test_the_command_that_is_named_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with running(["pretrain", "quickstart", "--set", "train.epochs=2", "--output=a b", "--set", "train.seed=1"]):
        named = same_command(output="a b-2", resume="a b", overrides=["train.epochs=4"])
        assert named == (
            "sslkit pretrain quickstart --set train.seed=1 --output 'a b-2' --resume 'a b' --set train.epochs=4"
        )
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        assert same_command(output="b") == "the same command with --output b"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert same_command(output="b") == "sslkit.train(recipe, 'b')"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert free_folder(tmp_path / "run") == free_folder(tmp_path / "run-2") == str(tmp_path / "run-3")
    (tmp_path / "run/notes.txt").write_text("x")
    said = cli_error(["pretrain", "quickstart", "--output", str(tmp_path / "run")])
    assert said.endswith(f"sslkit pretrain quickstart --output {tmp_path}/run-3")
