"""The steps after the crop, for a whole batch at once on the device that the model computes on.

Each sample has its own random parameters, the same as on the CPU. Pixels stay floats between the steps, so that they
differ from the CPU's by rounding. The host decides which samples a step applies to: nothing waits for the device.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from sslkit.data.augment.blur_kernels import CUTOFF
from sslkit.data.augment.parameters import Columns
from sslkit.data.augment.tensorflow import BLUR_DIVIDER, unchanged
from sslkit.data.augment.tensorflow import LUMA as TENSORFLOW_LUMA
from sslkit.data.augment.views_config import ViewPolicy, ViewsConfig
from sslkit.data.batch import Batch

LUMA = (0.299, 0.587, 0.114)


def finish_on(device: torch.device, batch: Batch, config: ViewsConfig) -> Batch:
    """Move a batch to ``device``, and finish its views there if the CPU has only cropped them."""
    views = [view.to(device, non_blocking=True) for view in batch.views]
    if batch.view_params:
        parts = zip(views, batch.view_params, config.view_policies(), strict=True)
        views = [finish_views(view, params, policy) for view, params, policy in parts]
    return replace(batch, views=views, sample_ids=batch.sample_ids.to(device, non_blocking=True), view_params=())


@torch.no_grad()
def finish_views(pixels: Tensor, params: Tensor, policy: ViewPolicy) -> Tensor:
    """Do all that follows the crop to one view of a batch.

    Args:
        pixels: (B, H, W, 3) uint8, on any device; so is the result.
        params: (B, 18) float32 on the CPU, rows of `ViewParams.as_row`.
        policy: How this view is made.
    """
    images = pixels.permute(0, 3, 1, 2).float()
    gray = params[:, Columns.gray] > 0
    to_gray = partial(_to_gray, luma=TENSORFLOW_LUMA if policy.transforms == "tensorflow" else LUMA)
    if policy.gray_first:
        _change(images, gray, to_gray)
    _jitter(images, params, policy)
    if not policy.gray_first:
        _change(images, gray, to_gray)
    _blur_each(images, params[:, Columns.sigma], policy)
    _change(images, params[:, Columns.solarize] > 0, lambda rows: torch.where(rows >= 127.5, 255.0 - rows, rows))
    _change(images, params[:, Columns.flip] > 0, lambda rows: rows.flip(3))
    angle = params[:, Columns.angle]
    _change(images, angle != 0, lambda rows: _rotate(rows, angle[angle != 0]))
    hole = params[:, Columns.hole]
    holed = hole[:, 2] > 0
    _change(images, holed, lambda rows: _erase(rows, hole[holed]))
    return images.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _change(images: Tensor, which: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Apply ``change`` to the samples that the mask ``which`` (B,) selects, in place."""
    rows = which.nonzero()[:, 0]
    if len(rows):
        rows = _to_device(images, rows)
        images.index_copy_(0, rows, change(images.index_select(0, rows)))


def _to_device(images: Tensor, values: Tensor) -> Tensor:
    """Copy values from the host to the images' device, asynchronously."""
    if images.device.type == "cuda":
        values = values.pin_memory()
    return values.to(images.device, non_blocking=True)


def _jitter(images: Tensor, params: Tensor, policy: ViewPolicy) -> None:
    jittered, order = params[:, Columns.jittered] > 0, params[:, Columns.order]
    adjusts = [_brighten, _contrast, _saturate, _shift_hue]
    if policy.transforms == "tensorflow":
        adjusts[1:3] = [_contrast_of_channels, _saturate_in_hsv]
    if policy.brightness == "add":
        adjusts[0] = _add_brightness
    for place in range(4):
        for number, adjust in enumerate(adjusts):
            factor = params[:, Columns.brightness + number]
            which = jittered & (order[:, place] == number) & (factor != unchanged(number, policy))
            factors = _to_device(images, factor[which])[:, None, None, None]
            _change(images, which, lambda rows, adjust=adjust, factors=factors: adjust(rows, factors))  # type: ignore[misc]


def _luma(images: Tensor, luma: tuple[float, ...] = LUMA) -> Tensor:
    """The luma, (B, 1, H, W)."""
    return (images * images.new_tensor(luma)[:, None, None]).sum(dim=1, keepdim=True)


def _to_gray(images: Tensor, luma: tuple[float, ...]) -> Tensor:
    return _luma(images, luma).expand_as(images)


def _brighten(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0.0, 255.0)


def _add_brightness(images: Tensor, share: Tensor) -> Tensor:
    return (images + 255.0 * share).clamp_(0.0, 255.0)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def _contrast_of_channels(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images.mean(dim=(2, 3), keepdim=True), images, factor)


def _saturate(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(images), images, factor)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(base.expand_as(images), images, factor.expand_as(images)).clamp_(0.0, 255.0)


def _saturate_in_hsv(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the saturation of HSV, at most to 1; hue and value are kept."""
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    return value - (value - images) * torch.minimum(factor, value / chroma.clamp_min(1e-6))


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of the hexagonal HSV by shares of the circle; value and saturation are kept.

    With hue h in sixths, value v and chroma c, channel n of (5, 3, 1) is v - c * clamp(min(k, 4 - k), 0, 1) where
    k = (n + h) mod 6.
    """
    value, largest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    difference = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green))
    sixths = difference / chroma.clamp_min(1e-6) + 2.0 * largest + 6.0 * shift
    places = (sixths + images.new_tensor([5.0, 3.0, 1.0])[:, None, None]).remainder(6.0)
    return value - chroma * torch.minimum(places, 4.0 - places).clamp_(0.0, 1.0)


def _blur_each(images: Tensor, sigma: Tensor, policy: ViewPolicy) -> None:
    """Blur each sample by its own ``sigma`` (B,), 0 for none, in place."""
    if policy.transforms == "tensorflow":
        radius = torch.full_like(sigma, images.shape[2] // BLUR_DIVIDER)
        which = (sigma > 0) & (radius > 0)
        _change(images, which, lambda rows: _blur(rows, sigma[which], radius[which], "constant"))
        return
    radius = (CUTOFF * sigma).floor()
    slightly, more = (sigma > 0) & (radius == 0), radius > 0
    _change(images, slightly, lambda rows: _blur_slightly(rows, sigma[slightly]))
    _change(images, more, lambda rows: _blur(rows, sigma[more], radius[more], "reflect"))


def _blur(images: Tensor, sigma: Tensor, radii: Tensor, padding: str) -> Tensor:
    """Blur each sample by its own Gaussian, rows then columns; ``padding`` is "constant" (zeros) or "reflect"."""
    count, channels, height, width = images.shape
    radius = int(radii.max())
    places = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)
    kernels[places.abs() > radii[:, None]] = 0.0
    kernels = _to_device(images, kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = pad(images.reshape(1, count * channels, height, width), [radius] * 4, mode=padding)
    planes = conv2d(planes, kernels[:, None, None, :], groups=count * channels)
    planes = conv2d(planes, kernels[:, None, :, None], groups=count * channels)
    return planes.view_as(images)


def _blur_slightly(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur by small sigmas as Pillow does: three passes along rows, then three along columns.

    The kernel of a pass is `small_kernel`; values are rounded after each pass, and edges are repeated.
    """
    weight = _to_device(images, sigma**2 / 6.0)[:, None, None, None]
    images = images.round()
    for axis, padding in ((3, [1, 1, 0, 0]), (2, [0, 0, 1, 1])):
        for _ in range(3):
            padded = pad(images, padding, mode="replicate")
            neighbours = padded.narrow(axis, 0, images.shape[axis]) + padded.narrow(axis, 2, images.shape[axis])
            images = (images + weight * (neighbours - 2.0 * images)).round()
    return images


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate square images about their centres by degrees, counter-clockwise; the corners become black."""
    turn = angle * (math.pi / 180.0)
    zero = torch.zeros_like(turn)
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], dim=1), torch.stack([turn.sin(), turn.cos(), zero], dim=1)]
    grid = affine_grid(_to_device(images, torch.stack(rows, dim=1)), list(images.shape), align_corners=True)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _erase(images: Tensor, hole: Tensor) -> Tensor:
    """Set a rectangle of each image to black; ``hole`` (B, 4) has top, left, height and width."""
    top, left, height, width = _to_device(images, hole).T[:, :, None]
    down, right = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside_rows = (down >= top) & (down < top + height)
    inside_columns = (right >= left) & (right < left + width)
    return images.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
