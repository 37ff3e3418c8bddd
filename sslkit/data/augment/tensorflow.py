"""Resizing, jitter, grey and blur as TensorFlow computes them, on the CPU: for SimCLR's and BYOL's views.

Pixels are floats between the steps, in the scale of the crop's whole numbers: 0 to 255, or to 65535 for images of
channels. `device_views` does the same for a batch on an accelerator.
"""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from sslkit.data.augment.parameters import Draw
from sslkit.data.augment.policies import ViewsConfig

Pixels = NDArray[Any]  # (H, W, 3) uint8 or (H, W, C) uint16
Floats = NDArray[np.float32]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # by the numbers of `Draw.order`
LUMA = (0.2989, 0.5870, 0.1140)  # of `tf.image.rgb_to_grayscale`
TABLE_STEPS = 1024  # TensorFlow looks cubic weights up at this many places between two pixels
BLUR_DIVIDER = 20  # a kernel's radius is the view's side over this: the kernel spans a tenth of the side
BLUR_SPREAD = 4.0  # standard deviations after which weights are left out; together they are below 1e-4


def resize_by_taps(pixels: Pixels, side: int, interpolation: str, *, legacy: bool) -> Floats:
    """Resize (H, W, C) without antialiasing, as `tf.image.resize` does; turned over, (W, H, C), and not rounded.

    Values below zero, of a cubic's overshoot, become zero.

    Args:
        pixels: Whole numbers.
        side: In pixels.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        legacy: As `tf.compat.v1.image.resize_bicubic` (or ``_bilinear``) does it instead.
    """
    height, width, channels = pixels.shape
    rows = torch.from_numpy(np.ascontiguousarray(pixels)).view(height, width * channels).float()
    places, weights = taps(height, side, interpolation, legacy)
    shortened = embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
    columns = torch.from_numpy(swap_axes(shortened.view(side, width, channels).numpy())).view(width, side * channels)
    places, weights = taps(width, side, interpolation, legacy)
    resized = embedding_bag(places, columns, mode="sum", per_sample_weights=weights)
    return np.asarray(resized.clamp_min_(0.0).view(side, side, channels).numpy(), dtype=np.float32)


def swap_axes(image: NDArray[Any]) -> NDArray[Any]:
    """(H, W, C) as (W, H, C), contiguous."""
    if image.shape[2] == 3:
        return np.asarray(cv2.transpose(image))  # ten times as fast as NumPy
    return np.ascontiguousarray(image.transpose(1, 0, 2))


@lru_cache(maxsize=2048)
def taps(length: int, side: int, interpolation: str, legacy: bool) -> tuple[Tensor, Tensor]:
    """Which of ``length`` pixels each of ``side`` new ones is a sum of, and with which weights: both (side, 4).

    Pixels beyond the edges have no weight, and the others' sum is 1; in the legacy form the edge's pixel stands for
    them.
    """
    scale, half = np.float32(length / side), np.float32(0.0 if legacy else 0.5)
    centres = (np.arange(side, dtype=np.float32) + half) * scale - half
    first = np.floor(centres)
    beyond = (centres - first)[:, None]
    places = first.astype(np.int32)[:, None] + np.arange(-1, 3, dtype=np.int32)
    if interpolation == "bicubic":
        beyond = np.rint(beyond * TABLE_STEPS) / TABLE_STEPS
    distances = np.abs(beyond - np.arange(-1, 3))
    weights = cubic(distances, -0.75 if legacy else -0.5) if interpolation == "bicubic" else 1.0 - distances
    weights = np.maximum(weights, 0.0) if interpolation == "bilinear" else weights
    if not legacy:
        weights = np.where((places >= 0) & (places < length), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(places.clip(0, length - 1)), torch.from_numpy(weights.astype(np.float32))


def cubic(distance: NDArray[np.floating[Any]], a: float) -> NDArray[np.floating[Any]]:
    """The cubic convolution kernel of Keys (1981) with parameter ``a``, for distances from 0 to 2."""
    near = (a + 2.0) * distance**3 - (a + 3.0) * distance**2 + 1.0
    far = a * (distance**3 - 5.0 * distance**2 + 8.0 * distance - 4.0)
    return np.where(distance <= 1.0, near, far)


def change_colours(pixels: Pixels, draw: Draw, config: ViewsConfig, full_scale: float) -> Floats:
    """Jitter, grey, blur and solarize a crop (side, side, C) as drawn; floats within the full scale, not rounded.

    Saturation, hue and grey need three channels, and are left out of a draw for others.
    """
    floats: Floats = pixels.astype(np.float32)
    if draw.gray and config.gray_first:
        floats = turn_gray(floats)
    if draw.jitter is not None:
        floats = jitter(floats, draw, config, full_scale)
    if draw.gray and not config.gray_first:
        floats = turn_gray(floats)
    if draw.sigma:
        floats = blur(floats, draw.sigma)
    if draw.solarize:
        floats = np.where(floats >= full_scale / 2, full_scale - floats, floats)
    return floats


def jitter(floats: Floats, draw: Draw, config: ViewsConfig, full_scale: float) -> Floats:
    """Brightness, contrast, saturation and hue in the draw's order, clipped after each; may overwrite ``floats``."""
    in_hsv = False
    for number in draw.order:
        factor = (draw.jitter or ())[number]
        if factor == (0.0 if number == HUE or (number == BRIGHTNESS and config.brightness == "add") else 1.0):
            continue
        if in_hsv != (number in (SATURATION, HUE)):
            floats = _as_float(cv2.cvtColor(floats, cv2.COLOR_HSV2RGB if in_hsv else cv2.COLOR_RGB2HSV))
            in_hsv = not in_hsv
        if number == BRIGHTNESS:
            floats = brighten(floats, factor, full_scale, add=config.brightness == "add")
        elif number == CONTRAST:
            floats = contrast(floats, factor, full_scale)
        elif number == SATURATION:
            floats[..., 1] = np.minimum(floats[..., 1] * np.float32(factor), 1.0)
        else:
            floats[..., 0] += np.float32(360.0 * (factor % 1.0))  # OpenCV takes hues above the circle, not below it
    return _as_float(cv2.cvtColor(floats, cv2.COLOR_HSV2RGB)) if in_hsv else floats


def brighten(floats: Floats, factor: float, full_scale: float, *, add: bool) -> Floats:
    """Multiply by a factor, or add a share of the full scale; in place."""
    if add:
        floats += np.float32(factor * full_scale)
    else:
        floats *= np.float32(factor)
    return np.clip(floats, 0.0, full_scale, out=floats)


def contrast(floats: Floats, factor: float, full_scale: float) -> Floats:
    """Move values away from the mean of their channel, or towards it; in place."""
    rows = floats.reshape(len(floats), -1)
    means = rows.mean(axis=0).reshape(floats.shape[1:]).mean(axis=0, dtype=np.float64)
    rows *= np.float32(factor)
    rows += np.tile((means * (1.0 - factor)).astype(np.float32), floats.shape[1])
    return np.clip(floats, 0.0, full_scale, out=floats)


def turn_gray(floats: Floats) -> Floats:
    """Three channels, each the luma."""
    return _as_float(cv2.transform(floats, np.array([LUMA] * 3, dtype=np.float32)))


def blur_kernel(side: int, sigma: float) -> Floats:
    """Weights of the blur of a view of ``side`` pixels in one direction: an odd number of them, of sum 1."""
    radius = min(side // BLUR_DIVIDER, int(np.ceil(BLUR_SPREAD * sigma)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return _as_float(weights / weights.sum())


def blur(floats: Floats, sigma: float) -> Floats:
    """A Gaussian blur; beyond the edges everything is zero, so that edges darken."""
    kernel = blur_kernel(len(floats), sigma)
    channels = floats.shape[2]
    if channels <= 4:  # more than OpenCV takes at a time
        blurred = cv2.sepFilter2D(floats, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
        return _as_float(blurred).reshape(floats.shape)
    planes = [blur(np.ascontiguousarray(floats[..., channel : channel + 1]), sigma) for channel in range(channels)]
    return np.concatenate(planes, axis=2)


def _as_float(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float32)
