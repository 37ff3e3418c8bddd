"""Views of images with any number of channels, in 16 bits: the steps that do not need colours."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from sslkit.data.augment.blur_kernels import CUTOFF, gaussian_kernel, small_kernel
from sslkit.data.augment.parameters import ViewParams
from sslkit.data.augment.tensorflow import BRIGHTNESS, CONTRAST, Floats, change_colours, resize_by_taps
from sslkit.data.augment.views_config import ViewPolicy
from sslkit.data.decode.channels import FULL_SCALE
from sslkit.data.decode.orientation import mirror
from sslkit.data.decode.rgb import Pixels


def resize_channels(values: Pixels, side: int, interpolation: str, kind: str = "antialias") -> Pixels:
    """Resize (H, W, C) to (side, side, C) as ``[views] resize`` says; computed in floats and rounded once."""
    if values.shape[:2] == (side, side):
        return values
    if kind != "antialias":
        transposed = resize_by_taps(values, side, interpolation, legacy=kind == "tensorflow_v1")
        return _rounded(transposed.transpose(1, 0, 2))
    batch = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)
    return _rounded(interpolate(batch, (side, side), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy())


def finish_channels(values: Pixels, params: ViewParams, policy: ViewPolicy) -> Pixels:
    """Do all that follows the crop to (side, side, C) uint16 values, which are left as they are.

    Brightness multiplies or adds. Contrast scales the distance of values from the mean of their channel. Solarize
    inverts values in the upper half of the full scale. Blur, flip, rotation and erasing are the same for all channels.
    """
    if policy.transforms == "tensorflow":
        pixels = change_colours(values, params, policy, float(FULL_SCALE))
    else:
        pixels = _change_values(values.astype(np.float32), params, policy)
    return _rounded(flip_rotate_erase(pixels, params))


def flip_rotate_erase(pixels: NDArray[Any], params: ViewParams) -> NDArray[Any]:
    """Flip, rotate and erase a view (side, side, C), which is left as it is; corners and rectangle become black."""
    if params.flip:
        pixels = mirror(pixels)
    if params.angle:
        middle = (len(pixels) - 1) / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), params.angle, 1.0)
        pixels = _by_channel(pixels, lambda part: cv2.warpAffine(part, matrix, part.shape[:2]))
    if params.hole:
        top, left, height, width = params.hole
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = 0
    return pixels


def _change_values(pixels: Floats, params: ViewParams, policy: ViewPolicy) -> Floats:
    for number in params.order if params.jitter else ():
        factor = np.float32((params.jitter or ())[number])
        if number == BRIGHTNESS:
            changed = pixels + factor * FULL_SCALE if policy.brightness == "add" else pixels * factor
            pixels = np.clip(changed, 0, FULL_SCALE)
        elif number == CONTRAST:
            mean = pixels.mean(axis=(0, 1), keepdims=True)
            pixels = np.clip(mean + factor * (pixels - mean), 0, FULL_SCALE)
    if params.sigma:
        kernel = _blur_kernel(params.sigma)
        pixels = _by_channel(pixels, lambda part: cv2.sepFilter2D(part, -1, kernel, kernel))
    if params.solarize:
        pixels = np.where(pixels > FULL_SCALE / 2, FULL_SCALE - pixels, pixels)
    return pixels


def _blur_kernel(sigma: float) -> NDArray[Any]:
    """A Gaussian; where it would be a single weight, three passes of `small_kernel` in one kernel."""
    if radius := int(CUTOFF * sigma):
        return gaussian_kernel(sigma, radius)
    third = small_kernel(sigma)
    return np.convolve(np.convolve(third, third), third).astype(np.float32)


def _by_channel(pixels: NDArray[Any], change: Callable[[NDArray[Any]], Any]) -> NDArray[Any]:
    """Change RGB as a whole, other channels one by one: OpenCV takes at most four at a time."""
    if pixels.shape[2] == 3:
        return np.asarray(change(np.ascontiguousarray(pixels)))
    planes = [change(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2])]
    return np.stack(planes, axis=2)


def _rounded(pixels: Floats) -> Pixels:
    return np.ascontiguousarray(np.clip(np.rint(pixels), 0, FULL_SCALE), dtype=np.uint16)
