"""Views that do not differ as they should, each defect named."""

import os
from typing import Any

import numpy as np
import pytest
from conftest import small_recipe

from sslkit.data.augment import cpu as views
from sslkit.data.augment.parameters import draw_params
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor.view_checks import check_views
from sslkit.recipe.resolve import Recipe

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


def same_view(policy: Any, key: tuple[int, int, int, int], size: Any) -> Any:
    return draw_params(policy, (*key[:3], 0), size)


def same_epoch(policy: Any, key: tuple[int, int, int, int], size: Any) -> Any:
    return draw_params(policy, (key[0], 0, *key[2:]), size)


def same_sample(policy: Any, key: tuple[int, int, int, int], size: Any) -> Any:
    return draw_params(policy, (*key[:2], 0, key[3]), size)


STREAM = np.random.default_rng(0)


def own_stream(policy: Any, key: tuple[int, int, int, int], size: Any) -> Any:
    """A generator of the library's own, which every forked worker inherits in the same state."""
    seed, epoch, _, view = key
    return draw_params(policy, (seed, epoch, int(STREAM.integers(2**31)), view), size)


def by_process(policy: Any, key: tuple[int, int, int, int], size: Any) -> Any:
    seed, epoch, sample, view = key
    return draw_params(policy, (seed, epoch, sample + os.getpid(), view), size)


@pytest.mark.parametrize(
    ("drawn", "check"),
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
    drawn: Any, check: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "draw_params", drawn)
    assert faults(small_recipe(), source) == [check]


def test_no_transform_is_random(source: ImageSource) -> None:
    assert faults(small_recipe(views=STILL), source) == ["views"]
    for only in ({"flip_prob": 0.5}, {"jitter_prob": 0.8}, {"crop_scale": [0.8, 1.0]}):
        assert "views" not in faults(small_recipe(views={**STILL, **only}), source) or only == {"flip_prob": 0.5}


def test_no_false_alarm(source: ImageSource) -> None:
    findings = check_views(small_recipe(), source)
    assert [finding.verdict for finding in findings] == ["ok"] * 4
