"""Raw pixels and colour histograms against Pillow and NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.evaluate.features.pixel_baselines import (
    colour_histograms,
    pixel_baselines,
    raw_pixel_side,
    raw_pixels,
)


@pytest.fixture
def coloured(tmp_path: Path) -> ImageSource:
    """Garments in the colour of their class, with noise."""
    rng = np.random.default_rng(0)
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    for index in range(12):
        pixels = source.read(index) * rng.random(3) + rng.integers(0, 8, size=(28, 28, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((40, 36)).save(tmp_path / f"{index:02d}.png")
    return open_source(DataConfig(path=str(tmp_path)))


def test_histograms_are_those_of_numpy(coloured: ImageSource) -> None:
    side = raw_pixel_side(coloured)
    assert side == 32
    found = pixel_baselines(raw_pixels(coloured, side), raw_pixels(coloured.subset(np.arange(3)), side))
    assert list(found) == ["raw pixels", "colour histograms"]
    train, test = found["colour histograms"]
    for index in range(len(coloured)):
        image = Image.fromarray(coloured.read(index)).resize((side, side), Image.Resampling.BILINEAR)
        values = np.asarray(image).reshape(-1, 3)
        counts, _ = np.histogramdd(values, bins=8, range=[(0, 256)] * 3)
        expected = np.sqrt(counts.ravel() / counts.sum())
        np.testing.assert_allclose(train[index], expected, atol=1e-6)
        np.testing.assert_allclose(found["raw pixels"][0][index], values.ravel() / 255, atol=1e-6)
    assert torch.equal(train[:3], test)


def test_white_is_in_the_last_bin_and_norms_are_1() -> None:
    histograms = colour_histograms(torch.ones(2, 3 * 8 * 8))
    assert histograms[:, -1].tolist() == [1.0, 1.0]
    assert histograms.square().sum(dim=1).tolist() == [1.0, 1.0]


def test_grey_images_have_no_histograms() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test")).subset(np.arange(20))
    pixels = raw_pixels(source, raw_pixel_side(source))
    assert list(pixel_baselines(pixels, pixels)) == ["raw pixels"]


def test_workers_read_the_same_pixels(coloured: ImageSource) -> None:
    assert torch.equal(raw_pixels(coloured, 16, workers=1), raw_pixels(coloured, 16))
