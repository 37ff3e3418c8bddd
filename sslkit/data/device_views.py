"""All that follows a view's crop, for a whole batch at once on the device that the model computes on.

Every sample has draws of its own, the same as on the CPU; pixels are kept as floats between the steps, so that they
differ from the CPU's by rounding. Which samples a step is for is settled on the host, so that no device is waited for.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from sslkit.data.draws import Columns
from sslkit.data.loader import Batch
from sslkit.data.policies import ViewsConfig

LUMA = (0.299, 0.587, 0.114)
SPREAD = 3.5  # standard deviations at which a blur's kernel ends, as albumentations has it


def finish_on(device: torch.device, batch: Batch, config: ViewsConfig) -> Batch:
    """The batch on ``device``, its views finished there if the CPU has only cropped them."""
    views = [view.to(device, non_blocking=True) for view in batch.views]
    if batch.draws:
        pairs = zip(views, batch.draws, strict=True)
        views = [finish_views(view, draws, gray_first=config.gray_first) for view, draws in pairs]
    return replace(batch, views=views, sample_ids=batch.sample_ids.to(device, non_blocking=True), draws=())


@torch.no_grad()
def finish_views(pixels: Tensor, draws: Tensor, *, gray_first: bool) -> Tensor:
    """Do to a batch of crops what was drawn for each.

    Args:
        pixels: (B, H, W, 3) uint8, on any device.
        draws: (B, 18) float32 on the CPU, rows of `Draw.numbers`.
        gray_first: Whether grey comes before the jitter.

    Returns:
        (B, H, W, 3) uint8, on the pixels' device.
    """
    images = pixels.permute(0, 3, 1, 2).float()
    gray = draws[:, Columns.gray] > 0
    if gray_first:
        _change(images, gray, _turn_gray)
    _jitter(images, draws)
    if not gray_first:
        _change(images, gray, _turn_gray)
    sigma = draws[:, Columns.sigma]
    _change(images, sigma > 0, lambda rows: _blur(rows, sigma[sigma > 0]))
    _change(images, draws[:, Columns.solarize] > 0, lambda rows: torch.where(rows >= 127.5, 255.0 - rows, rows))
    _change(images, draws[:, Columns.flip] > 0, lambda rows: rows.flip(3))
    angle = draws[:, Columns.angle]
    _change(images, angle != 0, lambda rows: _rotate(rows, angle[angle != 0]))
    hole = draws[:, Columns.hole]
    holed = hole[:, 2] > 0
    _change(images, holed, lambda rows: _blank(rows, hole[holed]))
    return images.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _change(images: Tensor, which: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the samples that ``which`` (B,) marks by what ``change`` makes of them, in place."""
    rows = which.nonzero()[:, 0]
    if len(rows):
        rows = _beside(images, rows)
        images.index_copy_(0, rows, change(images.index_select(0, rows)))


def _beside(images: Tensor, values: Tensor) -> Tensor:
    """Host values on the images' device, without waiting for it."""
    if images.device.type == "cuda":
        values = values.pin_memory()
    return values.to(images.device, non_blocking=True)


def _jitter(images: Tensor, draws: Tensor) -> None:
    jittered, order = draws[:, Columns.jittered] > 0, draws[:, Columns.order]
    for place in range(4):
        for number, adjust in enumerate((_brighten, _contrast, _saturate, _turn_hue)):
            factor = draws[:, Columns.brightness + number]
            which = jittered & (order[:, place] == number) & (factor != (0.0 if adjust is _turn_hue else 1.0))
            factors = _beside(images, factor[which])[:, None, None, None]
            _change(images, which, lambda rows, adjust=adjust, factors=factors: adjust(rows, factors))  # type: ignore[misc]


def _luma(images: Tensor) -> Tensor:
    """Grey values (B, 1, H, W)."""
    weights = images.new_tensor(LUMA)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _turn_gray(images: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _brighten(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0.0, 255.0)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, factor.expand_as(images)).clamp_(0.0, 255.0)


def _saturate(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images).expand_as(images), images, factor.expand_as(images)).clamp_(0.0, 255.0)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of the hexagonal HSV by shares of the circle; value and saturation stay.

    With hue h in sixths, value v and chroma c, channel n of (5, 3, 1) is v - c * clamp(min(k, 4 - k), 0, 1) where
    k = (n + h) mod 6.
    """
    value, largest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    sixths = (
        torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green))
        / chroma.clamp_min(1e-6)
        + 2.0 * largest
    )
    sixths = sixths + 6.0 * turn
    places = (sixths + images.new_tensor([5.0, 3.0, 1.0])[:, None, None]).remainder(6.0)
    return value - chroma * torch.minimum(places, 4.0 - places).clamp_(0.0, 1.0)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of its own for each sample, rows then columns; edges are mirrored."""
    count, channels, height, width = images.shape
    radius = int(SPREAD * float(sigma.max()))
    if not radius:
        return images
    places = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (places / sigma[:, None]) ** 2)
    kernels[places.abs() > (SPREAD * sigma[:, None]).floor()] = 0.0
    kernels = _beside(images, kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = pad(images.reshape(1, count * channels, height, width), [radius] * 4, mode="reflect")
    planes = conv2d(planes, kernels[:, None, None, :], groups=count * channels)
    planes = conv2d(planes, kernels[:, None, :, None], groups=count * channels)
    return planes.view_as(images)


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Turn square images about their middles, counter-clockwise, by degrees; what comes in is black."""
    turn = angle * (math.pi / 180.0)
    zero = torch.zeros_like(turn)
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], dim=1), torch.stack([turn.sin(), turn.cos(), zero], dim=1)]
    grid = affine_grid(_beside(images, torch.stack(rows, dim=1)), list(images.shape), align_corners=True)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _blank(images: Tensor, hole: Tensor) -> Tensor:
    """Black rectangles: top, left, height, width of each."""
    top, left, height, width = _beside(images, hole).T[:, :, None]
    down, right = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside_rows = (down >= top) & (down < top + height)
    inside_columns = (right >= left) & (right < left + width)
    return images.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
