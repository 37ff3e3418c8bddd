"""Colour steps on bytes: those of albumentations, to the byte, in any order and however they are taken together."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from sslkit.data.augment.cpu import SOLARIZED, ByteColours, ViewTransforms
from sslkit.data.augment.parameters import ViewParams, draw_params
from sslkit.data.augment.views_config import ViewsConfig

Image = NDArray[np.uint8]
NAMES = ("brightness", "contrast", "saturation")


def images() -> list[Image]:
    """Noise, noise with little contrast, a ramp, black, white; one not contiguous."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (61, 47, 3), dtype=np.uint8)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(4, axis=1)
    return [
        noise,
        noise // 9 + 100,
        ramp,
        np.zeros((8, 8, 3), np.uint8),
        np.full((8, 8, 3), 255, np.uint8),
        noise[:, 5:30],
    ]


def jitter_by_library(pixels: Image, step: int, factor: float) -> Image:
    if step == 3:
        return hue_written_out(pixels, factor)
    factors = dict.fromkeys(NAMES, (1.0, 1.0)) | {NAMES[step]: (factor, factor)}
    changed: Image = A.ColorJitter(**factors, hue=(0.0, 0.0), p=1.0)(image=np.ascontiguousarray(pixels))["image"]
    return changed


def hue_written_out(pixels: Image, shift: float) -> Image:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


def steps_of(view: ByteColours, factors: tuple[float, ...]) -> list[Callable[[], None]]:
    def brighten() -> None:
        if factors[0] != 1.0:
            view.look_up(np.arange(256, dtype=np.float32) * np.float32(factors[0]))

    return [
        brighten,
        lambda: view.scale_contrast(factors[1]),
        lambda: view.scale_saturation(factors[2]),
        lambda: view.shift_hue(factors[3]),
    ]


@pytest.mark.parametrize("which", range(6))
def test_steps_in_any_order_are_the_librarys(which: int) -> None:
    generator = np.random.default_rng(which)
    image = images()[which]
    before = image.copy()
    for order in permutations(range(4)):
        factors = (*generator.uniform(0.2, 1.8, 3).tolist(), float(generator.uniform(-0.5, 0.5)))
        view, expected = ByteColours(image), image
        for step in order:
            steps_of(view, factors)[step]()
            expected = jitter_by_library(expected, step, factors[step])
        view.look_up(SOLARIZED)
        expected = A.Solarize(threshold_range=(0.5, 0.5), p=1.0)(image=np.ascontiguousarray(expected))["image"]
        assert np.array_equal(view.pixels(), expected)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("factor", [1.0, 1.0 - 1e-7, 0.4, 1.6])
def test_one_step_is_the_librarys(factor: float) -> None:
    for image in images():
        for step in range(3):
            view = ByteColours(image)
            steps_of(view, (factor,) * 3 + (0.0,))[step]()
            assert np.array_equal(view.pixels(), jitter_by_library(image, step, factor))
        view = ByteColours(image)
        view.to_gray()
        gray: Any = A.ToGray(num_output_channels=3, p=1.0)(image=np.ascontiguousarray(image))["image"]
        assert np.array_equal(view.pixels(), gray)


def test_brightness_that_is_added_is_rounded() -> None:
    config = ViewsConfig.of_policy("moco_v2", brightness="add")
    for image in images():
        for share in (-0.8, -0.013, 0.0, 0.4):
            draw = ViewParams((0, 0, 8, 8), (share, 1.0, 1.0, 0.0), (0, 1, 2, 3), False, 0.0, False, False, 0.0, None)
            expected = np.rint(np.clip(image + np.float32(255.0 * share), 0.0, 255.0)).astype(np.uint8)
            assert np.array_equal(ViewTransforms(config)(image, draw), expected)


def test_draws_of_large_seeds_are_those_of_the_list() -> None:
    """A seed beyond 32 bits is two words, which an array of 32 bits would not hold."""
    policy = ViewsConfig.of_policy("moco_v2").view_policies()[0]
    draws = [draw_params(policy, (seed, 0, 1, 0), (375, 500)) for seed in (2**32 + 5, 5, 2**32 - 1, 2**40)]
    assert len({(*draw.box, draw.sigma) for draw in draws}) == 4
