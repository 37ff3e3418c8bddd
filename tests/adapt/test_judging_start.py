"""The untouched encoder is judged at the sizes that the time allows, once, and its best size is part of the verdict."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import sslkit.evaluate.features.readouts
from sslkit.adapt.adapt_weights import fitting_epochs
from sslkit.adapt.adapted_points import Point
from sslkit.adapt.judging import Judge
from sslkit.adapt.judging_cost import JudgingCost
from sslkit.adapt.start_weights import Start, at_size
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.evaluate.features.encoder import Encoder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of two colours, and of a brightness that hides them unless features are whitened."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(40):
        (folder / f"class{index % 2}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 64, (32, 32, 3)) + generator.integers(0, 120)
        pixels = pixels + np.array([12, 0, 0]) * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{index % 2}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def start() -> Start:
    torch.manual_seed(5)
    module: Any = timm.create_model("test_resnet", num_classes=0).eval()
    config = {"input_size": (3, 160, 160), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Start(Encoder(module, {**config, "crop_pct": 0.9, "crop_mode": "center"}, "test", "test_resnet"), {})


def judge_of(images: Path, store: Path, log: Callable[[str], None], retain: Path | None = None) -> Judge:
    config = DataConfig(path=str(images))
    return Judge(open_source(config), config, DataConfig(path=str(retain)) if retain else None, store, log)


def test_larger_sizes_are_judged_as_the_time_allows(images: Path, start: Start, tmp_path: Path) -> None:
    messages: list[str] = []
    judge = judge_of(images, tmp_path, messages.append)
    assert judge.judge_start(start, [32, 64, 160], 32, limit=0.0) == 32
    assert list(judge.starts) == [32]
    assert [line for line in messages if "not judged at 64 px: it would take about" in line]
    judge = judge_of(images, tmp_path, messages.append)
    assert judge.judge_start(start, [32, 64], 64, limit=0.0) == 64  # the size that is asked for is always judged
    assert list(judge.starts) == [32, 64]


def test_the_start_is_judged_once(images: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judge_of(images, tmp_path, lambda _: None)
    first.judge_start(start, [32, 64])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("extracted again")

    monkeypatch.setattr(sslkit.evaluate.features.readouts, "extract_features", refuse)
    again = judge_of(images, tmp_path, lambda _: None)
    again.judge_start(start, [32, 64])
    assert again.cost.of_image == first.cost.of_image
    for one, other in zip(first.candidates, again.candidates, strict=True):
        assert np.array_equal(one.correct, other.correct)
        assert one.name == other.name
    with torch.no_grad():
        changed = replace(start.encoder, module=timm.create_model("test_resnet", num_classes=0).eval())
    with pytest.raises(AssertionError, match="extracted again"):  # other weights have other features
        again.judge_start(replace(start, encoder=changed), [32])


def test_epochs_fit_with_their_judging() -> None:
    """7 epochs are judged at 7 points, 8 at 4."""
    assert fitting_epochs(10.0, lambda points: 5.0 * points, 100.0) == (8, 20.0)
    assert fitting_epochs(10.0, lambda points: 5.0 * points, 99.0) == (6, 30.0)
    assert fitting_epochs(10.0, lambda points: 5.0 * points, -1.0) == (1, 5.0)


def test_the_cost_grows_with_the_pixels(tmp_path: Path) -> None:
    cost = JudgingCost(tmp_path)
    assert cost.expected(64, 10) == 0.0
    cost.of_image = {32: 0.5, 64: 1.0}
    assert cost.expected(32, 10) == 5.0
    assert cost.expected(128, 10) == 40.0
    (tmp_path / "seconds.json").write_text("[]")
    assert JudgingCost(tmp_path).of_image == {}


def test_the_retained_images_are_judged_at_the_best_of_both(images: Path, start: Start, tmp_path: Path) -> None:
    """The end is the start itself: no use of the start may be missing on one side only."""
    judge = judge_of(images, tmp_path, lambda _: None, retain=images)
    judge.judge_start(start, [32], 32)
    same = at_size(start.encoder, 32)
    assert same is not None
    answer, _ = judge.judge_end([Point(1, 1, same)], 32)
    plain, whitened = (use.accuracy for use in answer.uses[:2])
    assert whitened > plain
    for found in (answer.comparisons, answer.retained):
        assert [each.difference.points for each in found] == [0.0, 0.0]
        assert found[0].start == found[0].end == whitened


def test_a_better_size_of_the_start_is_in_the_last_sentence(images: Path, start: Start, tmp_path: Path) -> None:
    judge = judge_of(images, tmp_path, lambda _: None)
    judge.judge_start(start, [32, 64], 32, compares_sizes=False)
    judge.candidates = [
        replace(each, correct=each.correct | True, merit=1.0) if each.size == 64 and not each.whitened else each
        for each in judge.candidates
    ]
    same = at_size(start.encoder, 32)
    assert same is not None
    answer, _ = judge.judge_end([Point(1, 1, same)], 32)
    assert answer.lines()[-1].startswith("Nothing gained: no difference seen")
    assert answer.lines()[-1].endswith("But the untouched encoder at 64 pixels has 100.0%: use --size 64")
    assert answer.verdict == answer.lines()[-1]
    assert not any("untouched" in line for line in answer.lines()[:-1])  # the scores were logged as they were found


def test_shared_images_are_told_in_proportion(images: Path, start: Start, tmp_path: Path) -> None:
    same = at_size(start.encoder, 32)
    assert same is not None
    found = []
    for count in (2, 30, 40):
        source = open_source(DataConfig(path=str(images))).subset(np.arange(count))
        judge = Judge(source, DataConfig(path=str(images)), None, tmp_path / "features", lambda _: None)
        judge.judge_start(start, [32], 32)
        answer, _ = judge.judge_end([Point(1, 1, same)], 32)
        found.append(next(each for each in answer.remarks if "are images of --data" in each))
    assert found[0].startswith("2 of the 40 judged images are images of --data")
    assert found[0].endswith("it did not see the other 38")
    assert "For the verdict on new images, leave these out" in found[1]
    assert "The verdict holds for these images" in found[2]
