"""Images of which there is nothing to tell apart are said at the start of a run, and by the doctor."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import small_recipe
from numpy.typing import NDArray
from PIL import Image

import sslkit
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.doctor.image_checks import COPIES, check_view_settings, summarise_images
from sslkit.engine.monitor.alarms import data_alarm
from sslkit.engine.monitor.image_variety import SAMPLED, sample_variety, variety_of
from sslkit.report import read_runs, summarise

COUNT = 24


def noise(seed: int, side: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def plain(*colour: int) -> NDArray[np.uint8]:
    return np.full((20, 20, 3), colour, np.uint8)


# Each image by its number; what is said in a run, of 16 drawn from the 24, and the doctor's verdict on all.
SETS: dict[str, tuple[Callable[[int], NDArray[np.uint8]], str, str]] = {
    "all different": (noise, "", "ok"),
    "black": (lambda _: plain(0, 0, 0), "16 of 16 sampled images have a single colour", "fault"),
    "a colour each": (lambda index: plain(index, 0, 10 * index), "16 of 16 .* a single colour", "fault"),
    "one picture": (lambda _: noise(0), "all 16 sampled images are the same", "fault"),
    "one picture and one other": (lambda index: noise(index == 7), "(all|are only 2 diff)", "warning"),
    "three pictures": (lambda index: noise(index % 3), "16 sampled images are only 3 different ones", "warning"),
    "mostly black": (lambda index: noise(index) if index % 4 == 0 else plain(0, 0, 0), "a single colour", "warning"),
    "each twice": (lambda index: noise(index // 2), "", "warning"),
    "one black in four": (lambda index: plain(0, 0, 0) if index % 4 == 0 else noise(index), "", "ok"),
}


def write(folder: Path, draw: Callable[[int], NDArray[np.uint8]]) -> Path:
    """As PNG and BMP by turns: the files of equal pictures differ."""
    folder.mkdir()
    for index in range(COUNT):
        Image.fromarray(draw(index)).save(folder / f"{index:02d}.{('png', 'bmp')[index % 2]}")
    return folder


@pytest.mark.parametrize("case", SETS)
def test_sets_of_images(case: str, tmp_path: Path) -> None:
    draw, words, verdict = SETS[case]
    source = open_source(DataConfig(path=str(write(tmp_path / "images", draw))))
    found = sample_variety(source, seed=0)
    alarms = data_alarm(found.sampled, found.different, found.plain)
    assert len(alarms) == bool(words)
    for alarm in alarms:
        with pytest.raises(ValueError, match=f"data: .*{words}.*sslkit data check"):
            raise ValueError(alarm)
    if case == "all different":
        assert found.sampled == SAMPLED // 2 + 1  # it has seen enough
    [finding] = [
        each for each in check_view_settings(small_recipe().views, summarise_images(source)) if each.check == COPIES
    ]
    assert finding.verdict == verdict, finding


def test_equal_bytes_of_another_shape_are_another_picture() -> None:
    values = np.arange(48, dtype=np.uint8)
    assert variety_of([values.reshape(2, 8, 3), values.reshape(8, 2, 3), values.reshape(8, 2, 3)]).different == 2


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_says_it_before_its_first_step_and_once(
    every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"path": str(write(tmp_path / "images", lambda _: noise(0))), "split": "train"}
    recipe = small_recipe(
        "simclr",
        "test_resnet",
        data=data,
        train={"max_steps": 2, "batch_size": 8},
        monitor={"diagnose_every": every},
    )
    run = sslkit.train(recipe, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("ALARM at step 0: data: all 16 sampled images are the same") == 1
    assert said.count("are the same") == 1
    assert said.index("ALARM") < said.index("epoch ")
    if every:
        rows = [json.loads(line) for line in (run.folder / "diagnostics.jsonl").read_text().splitlines()]
        assert [any(alarm.startswith("data: ") for alarm in row["alarms"]) for row in rows] == [True, False]
        [record] = read_runs([run.folder])
        assert any("are the same" in alarm.message for alarm in summarise(record).alarms)
    sslkit.train(recipe, tmp_path / "run")
    assert "are the same" not in capsys.readouterr().out
