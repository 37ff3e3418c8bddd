"""Elongated images: what is resized stays small, whatever their sides, and other images are read as before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional

from sslkit.errors import UserError
from sslkit.evaluate.detection.detect import evaluate_detect
from sslkit.evaluate.detection.detector_training import DetectProtocol
from sslkit.evaluate.features.transforms import LONGEST, ChannelTransform, evaluation_transform, training_transform
from sslkit.report.gallery.thumbnails import data_uri, make_sprite

RGB = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
STRIPS = [(1, 20_000), (20_000, 1), (2, 65_000), (65_000, 2), (3, 4000), (1, 9), (40, 3000)]
MANNERS: list[dict[str, Any]] = [
    {},
    {"crop_mode": "border"},
    {"crop_mode": "squash"},
    {"input_size": (3, 96, 192)},
    {"input_size": (3, 32, 32)},
]


def strip(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], axis=2).astype(np.uint8))


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of every image that Pillow or PyTorch was asked to resize to."""
    areas: list[int] = []
    by_pillow, by_torch = Image.Image.resize, functional.resize

    def pillow(image: Image.Image, size: tuple[int, int], *more: Any, **options: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        assert areas[-1] < 10_000_000, f"asked for {size}"
        return by_pillow(image, size, *more, **options)

    def torchs(image: Any, size: Any, *more: Any, **options: Any) -> Any:
        if isinstance(image, torch.Tensor) and isinstance(size, int):
            height, width = image.shape[-2:]
            areas.append(int(size**2 * max(height, width) / min(height, width)))
            assert areas[-1] < 10_000_000, f"asked for {size}"
        return by_torch(image, size, *more, **options)

    monkeypatch.setattr(Image.Image, "resize", pillow)
    monkeypatch.setattr(functional, "resize", torchs)
    return areas


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("size", STRIPS)
def test_no_strip_is_resized_whole(size: tuple[int, int], manner: dict[str, Any], resized: list[int]) -> None:
    config = {**RGB, **manner}
    result = evaluation_transform(config)(strip(*size))
    assert tuple(result.shape) == config["input_size"]
    _, height, width = config["input_size"]
    aspect = max(height, width) / min(height, width)
    assert max(resized) <= (max(height, width) / 0.875 + 1) ** 2 * (LONGEST * aspect + 2)
    torch.manual_seed(0)
    assert tuple(training_transform(config)(strip(*size)).shape) == config["input_size"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", STRIPS)
def test_no_strip_of_channels_is_resized_whole(size: tuple[int, int], training: bool, resized: list[int]) -> None:
    config = {**RGB, "input_size": (2, 64, 64), "mean": (0.5, 0.5), "std": (0.5, 0.5)}
    torch.manual_seed(0)
    image = torch.zeros(2, *size)
    assert ChannelTransform(config, is_training=training)(image).shape == (2, 64, 64)
    assert not resized or max(resized) <= 74**2 * (LONGEST + 2)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (31, 31), (20, 150), (150, 20), (500, 70)])
def test_other_images_keep_every_bit(size: tuple[int, int], manner: dict[str, Any]) -> None:
    config = {**RGB, **manner}
    plain: Callable[[Image.Image], torch.Tensor] = create_transform(**config, is_training=False)
    assert torch.equal(evaluation_transform(config)(strip(*size)), plain(strip(*size)))


@pytest.mark.parametrize("size", [(30, 500), (500, 30), (21, 400), (17, 1000)])
def test_the_middle_of_a_strip_is_what_the_whole_would_give(size: tuple[int, int]) -> None:
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    smooth = Image.fromarray((127 + 120 * np.sin(x / 9 + y / 7)).astype(np.uint8)).convert("RGB")
    plain = create_transform(**RGB, is_training=False)
    apart = (evaluation_transform(RGB)(smooth) - plain(smooth)).abs() * 127.5
    assert apart.mean() < 1.0  # of 255 levels; half an output pixel at most
    assert apart.max() < 8.0


def test_thumbnails_of_strips_stay_small() -> None:
    for size in STRIPS:
        pixels = np.asarray(strip(*size))
        assert len(data_uri(pixels, 112)) < 20_000
    assert make_sprite([np.asarray(strip(*size)) for size in STRIPS], 32).count == len(STRIPS)


def test_a_strip_of_which_detection_leaves_nothing_is_refused(tmp_path: Path) -> None:

    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        strip(1, 5000).save(tmp_path / split / "strip.png")
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 1], "area": 100, "iscrowd": 0}
        image = {"id": 1, "file_name": "strip.png", "width": 5000, "height": 1}
        whole = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(whole))
    with pytest.raises(
        UserError, match=r"strip.png: is 5000 x 1 pixels; resized to a longer side of 1333, its shorter side"
    ):
        evaluate_detect("resnet18", tmp_path, DetectProtocol.from_name("coco"))
