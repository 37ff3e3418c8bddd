"""SimCLR's and BYOL's views in float64, step by step, as TensorFlow's documentation describes the operations.

Pixels are in [0, 1]. `tensorflow_views.json` has what TensorFlow and the authors' code made of small inputs, `rough`
and `smooth` below.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from numpy.typing import NDArray

Image = NDArray[np.float64]

VALUES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def rough(height: int, width: int) -> NDArray[np.uint8]:
    y, x, channel = np.mgrid[:height, :width, :3]
    return ((y * y * 31 + x * 53 + channel * 97 + x * y * 7) % 256).astype(np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x, channel = np.mgrid[:height, :width, :3]
    return np.rint(128 + 60 * np.sin(0.31 * y + channel) + 50 * np.cos(0.23 * x - 2 * channel)).astype(np.uint8)


def kernel(distance: float, a: float) -> float:
    """Cubic convolution (Keys 1981)."""
    if distance < 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a if distance < 2 else 0.0


def resize_line(values: Image, side: int, kind: str, interpolation: str) -> Image:
    """Resize the first axis."""
    length, scale, new = len(values), len(values) / side, []
    for number in range(side):
        place = number * scale if kind == "tensorflow_v1" else (number + 0.5) * scale - 0.5
        total, weights = np.zeros(values.shape[1:]), 0.0
        for source in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            distance = abs(place - source)
            if interpolation == "bilinear":
                weight = max(1.0 - distance, 0.0)
            else:
                weight = kernel(distance, -0.75 if kind == "tensorflow_v1" else -0.5)
            if kind == "tensorflow" and not 0 <= source < length:
                continue
            total, weights = total + weight * values[min(max(source, 0), length - 1)], weights + weight
        new.append(total / weights)
    return np.stack(new)


def resize(image: Image, side: int, kind: str, interpolation: str = "bicubic") -> Image:
    lines = resize_line(image, side, kind, interpolation)
    return resize_line(lines.transpose(1, 0, 2), side, kind, interpolation).transpose(1, 0, 2)


def contrast(image: Image, factor: float) -> Image:
    mean = image.mean(axis=(0, 1))
    return mean + (image - mean) * factor


def saturation(image: Image, factor: float) -> Image:
    hue, saturated, value = np.moveaxis(rgb_to_hsv(image), 2, 0)
    return hsv_to_rgb(np.stack([hue, np.clip(saturated * factor, 0, 1), value], axis=2))


def hue(image: Image, turn: float) -> Image:
    angle, saturated, value = np.moveaxis(rgb_to_hsv(image), 2, 0)
    return hsv_to_rgb(np.stack([(angle + turn) % 1.0, saturated, value], axis=2))


def gray(image: Image) -> Image:
    return np.repeat((image @ [0.2989, 0.5870, 0.1140])[..., None], 3, axis=2)


def blur(image: Image, sigma: float) -> Image:
    """Zeros beyond the edges; the kernel spans a tenth of the side, or one more to be odd."""
    side = len(image)
    radius = int(side // 10 / 2)
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    band = sum(weight * np.eye(side, k=number - radius) for number, weight in enumerate(weights))
    return np.einsum("ab,bcd,ec->aed", band, image, band)


def jitter(image: Image, factors: tuple[float, ...], order: tuple[int, ...], *, add: bool) -> Image:
    for number in order:
        factor = factors[number]
        if number == 0:
            image = image + factor if add else image * factor
        else:
            image = (contrast, saturation, hue)[number - 1](image, factor)
        image = np.clip(image, 0, 1)
    return image


def view(pixels: NDArray[np.uint8], draw: Any, side: int, method: str, *, clip_first: bool = True) -> Image:
    """A whole view, (side, side, 3), of ``pixels`` by ``method``: ``"simclr"`` or ``"byol"``.

    ``clip_first`` clips the resize's overshoot before the jitter. SimCLR's code does not.
    """
    top, left, height, width = draw.box
    image = pixels[top : top + height, left : left + width] / 255.0
    image = resize(image, side, "tensorflow_v1" if method == "simclr" else "tensorflow")
    if clip_first or method == "byol":
        image = np.clip(image, 0, 1)
    if draw.flip:
        image = image[:, ::-1]
    if draw.jitter is not None:
        image = jitter(image, draw.jitter, draw.order, add=method == "byol")
    if draw.gray:
        image = gray(image)
    image = np.clip(image, 0, 1)
    if draw.sigma:
        image = blur(image, draw.sigma)
    if draw.solarize:
        image = np.where(image < 0.5, image, 1 - image)
    return np.clip(image, 0, 1)
