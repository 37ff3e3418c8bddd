"""Views that do not differ as they should, each defect named."""

import os
from typing import Any

import numpy as np
import pytest
from conftest import small_recipe

from sslkit.data.source import ImageSource, open_source
from sslkit.data.views import ViewPipeline
from sslkit.doctor.sight import check_views
from sslkit.recipe import Recipe

REAL_CUT = ViewPipeline.cut
STILL = {
    "crop_scale": [1.0, 1.0],
    "crop_ratio": [1.0, 1.0],
    "jitter_prob": 0.0,
    "flip_prob": 0.0,
}


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_source(small_recipe().data).without_labels()


def faults(recipe: Recipe, source: ImageSource) -> list[str]:
    return [finding.check for finding in check_views(recipe, source) if finding.verdict == "fault"]


def same_view(self: ViewPipeline, image: Any, epoch: int, sample: int, view: int) -> Any:
    return REAL_CUT(self, image, epoch, sample, 0)


def same_epoch(self: ViewPipeline, image: Any, epoch: int, sample: int, view: int) -> Any:
    return REAL_CUT(self, image, 0, sample, view)


def same_sample(self: ViewPipeline, image: Any, epoch: int, sample: int, view: int) -> Any:
    return REAL_CUT(self, image, epoch, 0, view)


def own_stream(self: ViewPipeline, image: Any, epoch: int, sample: int, view: int) -> Any:
    """The library's own generator, which every forked worker inherits in the same state."""
    return np.asarray(self.pipelines[view](image=image)["image"], dtype=np.uint8)


def by_process(self: ViewPipeline, image: Any, epoch: int, sample: int, view: int) -> Any:
    return REAL_CUT(self, image, epoch, sample + os.getpid(), view)


@pytest.mark.parametrize(
    ("cut", "check"),
    [
        (same_view, "views"),
        (same_epoch, "views by epoch"),
        (same_sample, "views by image"),
        (own_stream, "views by worker"),
        (by_process, "views by worker"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_defect_is_named_and_no_other(
    cut: Any, check: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ViewPipeline, "cut", cut)
    assert faults(small_recipe(), source) == [check]


def test_no_transform_is_random(source: ImageSource) -> None:
    assert faults(small_recipe(views=STILL), source) == ["views"]
    for only in ({"flip_prob": 0.5}, {"jitter_prob": 0.8}, {"crop_scale": [0.8, 1.0]}):
        assert "views" not in faults(small_recipe(views={**STILL, **only}), source) or only == {"flip_prob": 0.5}


def test_no_false_alarm(source: ImageSource) -> None:
    findings = check_views(small_recipe(), source)
    assert [finding.verdict for finding in findings] == ["ok"] * 4
