"""Resize, jitter, grey and blur as TensorFlow computes them, on the CPU: for SimCLR's and BYOL's views.

Pixels are floats between the steps, in the scale of the crop: 0 to 255, or 0 to 65535 for multi-channel images. `gpu`
does the same for a batch on an accelerator.
"""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from sslkit.data.augment.blur_kernels import gaussian_kernel
from sslkit.data.augment.parameters import ViewParams
from sslkit.data.augment.views_config import ViewPolicy
from sslkit.data.decode.orientation import transpose
from sslkit.data.decode.rgb import Pixels

Floats = NDArray[np.float32]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in `ViewParams.order`
LUMA = (0.2989, 0.5870, 0.1140)  # of `tf.image.rgb_to_grayscale`
TABLE_STEPS = 1024  # positions between two pixels in TensorFlow's table of cubic weights
BLUR_DIVIDER = 20  # a kernel's radius is the view's side over this: the kernel spans a tenth of the side
BLUR_CUTOFF = 4.0  # standard deviations beyond which weights are left out; their sum is below 1e-4


def resize_by_taps(pixels: Pixels, side: int, interpolation: str, *, legacy: bool) -> Floats:
    """Resize (H, W, C) without antialiasing, as `tf.image.resize` does, or as `tf.compat.v1.image` if ``legacy``.

    Returns the transpose, (side, side, C), not rounded. Negative values of a cubic's overshoot are set to zero.
    """
    height, width, channels = pixels.shape
    rows = torch.from_numpy(np.ascontiguousarray(pixels)).view(height, width * channels).float()
    places, weights = taps(height, side, interpolation, legacy)
    shortened = embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
    columns = torch.from_numpy(transpose(shortened.view(side, width, channels).numpy())).view(width, side * channels)
    places, weights = taps(width, side, interpolation, legacy)
    resized = embedding_bag(places, columns, mode="sum", per_sample_weights=weights)
    return np.asarray(resized.clamp_min_(0.0).view(side, side, channels).numpy(), dtype=np.float32)


@lru_cache(maxsize=2048)
def taps(length: int, side: int, interpolation: str, legacy: bool) -> tuple[Tensor, Tensor]:
    """The pixels of ``length`` that each of ``side`` new ones is a weighted sum of, and the weights: both (side, 4).

    Beyond the edges, weights are 0 and the others sum to 1; in the legacy form the edge is repeated.
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


def change_colours(pixels: Pixels, params: ViewParams, policy: ViewPolicy, full_scale: float) -> Floats:
    """Jitter, convert to grey, blur and solarize a crop (side, side, C): floats within the full scale, not rounded.

    Saturation, hue and grey need three channels; the parameters of other images have none.
    """
    floats: Floats = pixels.astype(np.float32)
    if params.gray and policy.gray_first:
        floats = to_gray(floats)
    if params.jitter is not None:
        floats = jitter(floats, params, policy, full_scale)
    if params.gray and not policy.gray_first:
        floats = to_gray(floats)
    if params.sigma:
        floats = blur(floats, params.sigma)
    if params.solarize:
        floats = np.where(floats >= full_scale / 2, full_scale - floats, floats)
    return floats


def jitter(floats: Floats, params: ViewParams, policy: ViewPolicy, full_scale: float) -> Floats:
    """Change brightness, contrast, saturation and hue in the order of ``params``; may overwrite ``floats``."""
    in_hsv = False
    for number in params.order:
        factor = (params.jitter or ())[number]
        if factor == unchanged(number, policy):
            continue
        if in_hsv != (number in (SATURATION, HUE)):
            floats = _as_float(cv2.cvtColor(floats, cv2.COLOR_HSV2RGB if in_hsv else cv2.COLOR_RGB2HSV))
            in_hsv = not in_hsv
        if number == BRIGHTNESS and policy.brightness == "add":
            floats = np.clip(floats + np.float32(factor * full_scale), 0.0, full_scale, out=floats)
        elif number == BRIGHTNESS:
            floats = np.clip(floats * np.float32(factor), 0.0, full_scale, out=floats)
        elif number == CONTRAST:
            floats = contrast(floats, factor, full_scale)
        elif number == SATURATION:
            floats[..., 1] = np.minimum(floats[..., 1] * np.float32(factor), 1.0)
        else:
            floats[..., 0] += np.float32(360.0 * (factor % 1.0))  # OpenCV takes hues above the circle, not below it
    return _as_float(cv2.cvtColor(floats, cv2.COLOR_HSV2RGB)) if in_hsv else floats


def unchanged(number: int, policy: ViewPolicy) -> float:
    """The number of a jitter step that changes nothing."""
    return 0.0 if number == HUE or (number == BRIGHTNESS and policy.brightness == "add") else 1.0


def contrast(floats: Floats, factor: float, full_scale: float) -> Floats:
    """Scale the distance of values from the mean of their channel; in place."""
    rows = floats.reshape(len(floats), -1)
    means = rows.mean(axis=0).reshape(floats.shape[1:]).mean(axis=0, dtype=np.float64)
    rows *= np.float32(factor)
    rows += np.tile((means * (1.0 - factor)).astype(np.float32), floats.shape[1])
    return np.clip(floats, 0.0, full_scale, out=floats)


def to_gray(floats: Floats) -> Floats:
    """Convert to grey: three channels, each the luma."""
    return _as_float(cv2.transform(floats, np.array([LUMA] * 3, dtype=np.float32)))


def blur(floats: Floats, sigma: float) -> Floats:
    """Blur by a Gaussian; pixels beyond the edges are zero, so that edges darken."""
    radius = min(len(floats) // BLUR_DIVIDER, int(np.ceil(BLUR_CUTOFF * sigma)))
    kernel = _as_float(gaussian_kernel(sigma, radius))
    channels = floats.shape[2]
    if channels <= 4:  # the most that OpenCV takes at a time
        blurred = cv2.sepFilter2D(floats, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
        return _as_float(blurred).reshape(floats.shape)
    planes = [blur(np.ascontiguousarray(floats[..., channel : channel + 1]), sigma) for channel in range(channels)]
    return np.concatenate(planes, axis=2)


def _as_float(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float32)
