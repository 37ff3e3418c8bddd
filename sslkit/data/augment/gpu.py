"""The steps after the crop, for a whole batch at once on the device that the model computes on.

Each sample has its own random parameters, the same as on the CPU. Pixels stay floats between the steps, so that they
differ from the CPU's by rounding. `sslkit.data.augment.device_plan` decides on the host which step is done to which
samples: nothing here waits for the device. Steps work in place, on neighbouring samples (n, 3, H, W).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from sslkit.data.augment.device_plan import JITTER
from sslkit.data.augment.views_config import ViewPolicy, ViewsConfig
from sslkit.data.batch import Batch, StepGroup, ViewPlan

BLENDED = ("contrast", "saturation")  # with grey, in torchvision's way
Step = Callable[[Tensor, Tensor], None]  # changes samples by their numbers


def finish_on(device: torch.device, batch: Batch, config: ViewsConfig) -> Batch:
    """Move a batch to ``device``, and finish its views there if the CPU has only cropped them."""
    batch = batch.to(device)
    if batch.plan is None:
        return batch
    packed, parts = batch.plan.packed, zip(batch.views, batch.plan.views, config.view_policies(), strict=True)
    return replace(batch, views=[finish_view(view, packed, plan, policy) for view, plan, policy in parts], plan=None)


@torch.no_grad()
def finish_view(pixels: Tensor, packed: Tensor, plan: ViewPlan, policy: ViewPolicy) -> Tensor:
    """Do all that follows the crop to one view of a batch, (B, H, W, 3) uint8; the result is too."""
    numbers = packed.view(torch.float32)
    luma, sectors = numbers[plan.constants][:, None, None].split(3)
    images = None
    for stage in plan.stages:
        source = pixels if images is None else images
        if stage.order is not None:
            source = source.index_select(0, packed[stage.order])
        images = _as_floats(source) if images is None else source
        if stage.groups[0].step in JITTER:
            _jitter(images, stage.groups, numbers, policy, (luma, sectors))
        else:
            for group in stage.groups:
                _step_of(group, policy, luma)(images[group.rows], numbers[group.numbers])
    if images is None:
        return pixels
    finished = images.round_().to(torch.uint8, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return finished if plan.restore is None else finished.index_select(0, packed[plan.restore])


def _as_floats(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) floats, one channel after the other in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _step_of(group: StepGroup, policy: ViewPolicy, luma: Tensor) -> Step:
    steps: dict[str, Step] = {
        "gray": lambda images, _: _to_gray(images, luma),
        "blur_slightly": _blur_slightly,
        "blur": _blur_to_black if policy.transforms == "tensorflow" else _blur_mirrored,
        "solarize": _solarize,
        "flip": _flip,
        "rotate": _rotate,
        "erase": _erase,
    }
    return steps[group.step]


def _jitter(
    images: Tensor,
    groups: Sequence[StepGroup],
    numbers: Tensor,
    policy: ViewPolicy,
    constants: tuple[Tensor, Tensor],
) -> None:
    """One step of colour jitter for each sample; ``groups`` follow one another in the order of `JITTER`."""
    luma, sectors = constants
    in_hsv = policy.transforms == "tensorflow"
    place = {group.step: group.rows for group in groups}
    parts = {group.step: (images[group.rows], numbers[group.numbers][:, None, None, None]) for group in groups}
    if "brightness" in parts:
        rows, factor = parts["brightness"]
        _ = rows.add_(factor) if policy.brightness == "add" else rows.mul_(factor)
    if in_hsv and "contrast" in parts:
        rows, factor = parts["contrast"]
        _blend(rows.mean(dim=(2, 3), keepdim=True), rows, factor)
    if not in_hsv and (blended := [place[step] for step in BLENDED if step in place]):
        start = blended[0].start
        gray = _luma(images[start : blended[-1].stop], luma)
        for step in (each for each in BLENDED if each in parts):
            base = gray[place[step].start - start : place[step].stop - start]
            _blend(base.mean(dim=(1, 2, 3), keepdim=True) if step == "contrast" else base, *parts[step])
    if clamped := [place[step].stop for step in (JITTER[:2] if in_hsv else JITTER[:3]) if step in place]:
        images[: clamped[-1]].clamp_(0.0, 255.0)
    if in_hsv and "saturation" in parts:
        _saturate_in_hsv(*parts["saturation"])
    if "hue" in parts:
        _shift_hue(*parts["hue"], sectors)


def _luma(images: Tensor, luma: Tensor) -> Tensor:
    """The luma, (n, 1, H, W)."""
    return (images * luma).sum(dim=1, keepdim=True)


def _to_gray(images: Tensor, luma: Tensor) -> None:
    images.copy_(_luma(images, luma).expand_as(images))


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> None:
    torch.lerp(base.expand_as(images), images, factor.expand_as(images), out=images)


def _saturate_in_hsv(images: Tensor, factor: Tensor) -> None:
    """Multiply the saturation of HSV, at most to 1; hue and value are kept."""
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    scale = torch.minimum(factor, value / chroma.clamp_min_(1e-6))
    torch.sub(value, (value - images).mul_(scale), out=images)


def _shift_hue(images: Tensor, shift: Tensor, sectors: Tensor) -> None:
    """Shift the hue of the hexagonal HSV by sixths of the circle; value and saturation are kept.

    With hue h in sixths, value v and chroma c, channel n of ``sectors`` (5, 3, 1) is v - c * clamp(min(k, 4 - k), 0, 1)
    where k = (n + h) mod 6.
    """
    value, largest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    around = torch.cat([images, images[:, :2]], dim=1)
    difference = (around[:, 1:4] - around[:, 2:5]).gather(1, largest)  # of the two channels that follow the largest
    sixths = difference.div_(chroma.clamp_min(1e-6)).add_(largest, alpha=2).add_(shift)
    places = (sixths + sectors).remainder_(6.0)
    share = torch.minimum(places, 4.0 - places).clamp_(0.0, 1.0)
    torch.sub(value, share.mul_(chroma), out=images)


def _blur_mirrored(images: Tensor, kernels: Tensor) -> None:
    _blur(images, kernels, "reflect")


def _blur_to_black(images: Tensor, kernels: Tensor) -> None:
    _blur(images, kernels, "constant")


def _blur(images: Tensor, kernels: Tensor, padding: str) -> None:
    """Blur each channel by its own kernel, rows then columns; ``padding`` is "constant" (zeros) or "reflect"."""
    count, channels, height, width = images.shape
    kernels = kernels.view(count * channels, 1, 1, -1)
    radius = kernels.shape[-1] // 2
    planes = pad(images.reshape(1, count * channels, height, width), [radius] * 4, mode=padding)
    planes = conv2d(planes, kernels, groups=count * channels)
    planes = conv2d(planes, kernels.transpose(2, 3), groups=count * channels)
    images.copy_(planes.view_as(images))


def _blur_slightly(images: Tensor, weight: Tensor) -> None:
    """Blur by small sigmas as Pillow does: three passes along rows, then three along columns.

    The kernel of a pass is `small_kernel`; values are rounded after each pass, and edges are repeated.
    """
    weight = weight[:, None, None, None]
    images.round_()
    for axis, padding in ((3, [1, 1, 0, 0]), (2, [0, 0, 1, 1])):
        for _ in range(3):
            padded = pad(images, padding, mode="replicate")
            neighbours = padded.narrow(axis, 0, images.shape[axis]) + padded.narrow(axis, 2, images.shape[axis])
            images.add_(neighbours.sub_(images, alpha=2).mul_(weight)).round_()


def _solarize(images: Tensor, _: Tensor) -> None:
    torch.where(images >= 127.5, 255.0 - images, images, out=images)


def _flip(images: Tensor, _: Tensor) -> None:
    images.copy_(images.flip(3))


def _rotate(images: Tensor, turns: Tensor) -> None:
    """Rotate square images about their centres by matrices (n, 2, 3); the corners become black."""
    grid = affine_grid(turns.view(-1, 2, 3), list(images.shape), align_corners=True)
    images.copy_(grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True))


def _erase(images: Tensor, hole: Tensor) -> None:
    """Set a rectangle of each image to black; ``hole`` has (n, 4) tops, lefts, heights and widths."""
    top, left, height, width = hole.view(-1, 4).T[:, :, None]
    down, right = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside_rows = (down >= top) & (down < top + height)
    inside_columns = (right >= left) & (right < left + width)
    images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
