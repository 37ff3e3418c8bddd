"""Views of images of any number of channels, in 16 bits: the steps that do not need colours."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from albumentations.augmentations.blur.functional import create_gaussian_kernel_1d
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from sslkit.data.augment.parameters import SPREAD, Draw
from sslkit.data.augment.policies import ViewsConfig
from sslkit.data.augment.tensorflow import BRIGHTNESS, CONTRAST, change_colours, resize_by_taps
from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.decode.rgb import Pixels

Floats = NDArray[np.float32]


def resize_channels(values: Pixels, side: int, interpolation: str, kind: str = "antialias") -> Pixels:
    """Resize (H, W, C) to (side, side, C) as ``[views] resize`` says, in floats and rounded once."""
    if values.shape[:2] == (side, side):
        return values
    if kind != "antialias":
        turned = resize_by_taps(values, side, interpolation, legacy=kind == "tensorflow_v1")
        return _rounded(turned.transpose(1, 0, 2))
    batch = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)
    return _rounded(interpolate(batch, (side, side), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy())


def finish_channels(values: Pixels, draw: Draw, config: ViewsConfig) -> Pixels:
    """Do to a crop (side, side, C) what was drawn; the one given stays as it is.

    Brightness multiplies or adds; contrast moves values away from, or towards, their channel's mean; solarizing inverts
    those in the upper half of the full scale; blur, mirror, rotation and blanking treat all channels alike.
    """
    if config.transforms == "tensorflow":
        pixels = change_colours(values, draw, config, float(FULL_SCALE))
    else:
        pixels = _change(values.astype(np.float32), draw, config)
    if draw.flip:
        pixels = pixels[:, ::-1]
    if draw.angle:
        middle = (pixels.shape[0] - 1) / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), draw.angle, 1.0)
        size = pixels.shape[:2][::-1]
        pixels = _planes(pixels, lambda plane: cv2.warpAffine(plane, matrix, size))
    if draw.hole:
        top, left, height, width = draw.hole
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = 0
    return _rounded(pixels)


def _change(pixels: Floats, draw: Draw, config: ViewsConfig) -> Floats:
    for number in draw.order if draw.jitter else ():
        factor = np.float32((draw.jitter or ())[number])
        if number == BRIGHTNESS:
            pixels = np.clip(
                pixels + factor * FULL_SCALE if config.brightness == "add" else pixels * factor, 0, FULL_SCALE
            )
        elif number == CONTRAST:
            mean = pixels.mean(axis=(0, 1), keepdims=True)
            pixels = np.clip(mean + factor * (pixels - mean), 0, FULL_SCALE)
    if draw.sigma:
        kernel = _blur_kernel(draw.sigma)
        pixels = _planes(pixels, lambda plane: cv2.sepFilter2D(plane, -1, kernel, kernel))
    if draw.solarize:
        pixels = np.where(pixels > FULL_SCALE / 2, FULL_SCALE - pixels, pixels)
    return pixels


def _blur_kernel(sigma: float) -> NDArray[Any]:
    """A Gaussian; where it would be a single weight, three passes of a kernel with a third of its variance each."""
    if int(SPREAD * sigma):
        return np.asarray(create_gaussian_kernel_1d(sigma))
    side = sigma**2 / 6.0
    third = np.array([side, 1.0 - 2.0 * side, side])
    return np.convolve(np.convolve(third, third), third).astype(np.float32)


def _planes(pixels: Floats, change: Callable[[Floats], Any]) -> Floats:
    """Change each channel by itself: OpenCV takes four at most at a time."""
    planes = [change(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2])]
    return np.stack(planes, axis=2)


def _rounded(pixels: Floats) -> Pixels:
    return np.ascontiguousarray(np.clip(np.rint(pixels), 0, FULL_SCALE), dtype=np.uint16)
