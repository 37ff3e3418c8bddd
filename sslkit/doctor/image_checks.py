"""Checks of the images, and of the recipe's views on images of this size and colour."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.augment.views_config import ViewPolicy, ViewsConfig
from sslkit.data.decode.background import KEEP
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.inspection import count_alpha, describe_alpha
from sslkit.doctor.findings import Check, Finding
from sslkit.engine.monitor.alarms import data_alarm
from sslkit.engine.monitor.image_variety import Variety, variety_of
from sslkit.errors import UserError
from sslkit.parts.backbone import whole_patches
from sslkit.progress import track

ALPHA, COPIES, COLOUR, CROPS = map(Check, ("alpha", "copies", "colour", "crops"))
SIZE, BLUR, PIXELS = map(Check, ("view size", "blur", "pixel values"))

SAMPLED = 32
COMPARED, COMPARING_SECONDS = 5000, 5.0  # files, at most, to find copies
MANY_COPIES = 0.1  # share of the compared images
SMALLEST_VIEW = 64  # smaller images gain by being enlarged to it: docs/plan.md
SMALLEST_LARGEST = 0.3  # share of the image that the largest crop covers
SMALLEST_CROP = 8.0  # pixels: the CIFAR-10 recipes, which work, go down to 9


@dataclass(frozen=True)
class ImageSummary:
    """Summary of an image source, from a sample of its images."""

    count: int  # images in the source
    height: int  # median, in pixels
    width: int  # median, in pixels
    grey: bool  # all sampled images are greyscale
    variety: Variety | None = None  # how many of the sampled images differ; None if not known
    sides: tuple[int, int, int] | None = None  # the shorter sides in the sample: least, median, largest; or not known
    copies: int = 0  # files that equal another one, of ``compared``
    compared: int = 0

    @property
    def different(self) -> int:
        """Number of images that differ, as far as they were compared."""
        return different_images(self.count, self.copies, self.compared)


def summarise_images(source: ImageSource) -> ImageSummary:
    """Read `SAMPLED` images, spread over the source; an UnreadableImage if none can be read."""
    shapes, grey, problem = list[tuple[int, int]](), list[bool](), UnreadableImage("no image")

    def readable() -> Iterator[NDArray[np.uint8]]:
        nonlocal problem
        chosen = np.linspace(0, len(source) - 1, min(SAMPLED, len(source)), dtype=int)
        for index in track(chosen, "images", "image"):
            try:
                image = source.read(int(index))
            except UnreadableImage as error:
                problem = error
                continue
            shapes.append((image.shape[0], image.shape[1]))
            grey.append(_is_grey(image))
            yield image

    variety = variety_of(readable())  # one image at a time: 32 photographs of 50 megapixels would be 5 GB
    if not shapes:
        raise problem
    height, width = (int(side) for side in np.median(shapes, axis=0))
    shorter = np.min(shapes, axis=1)
    sides = (int(shorter.min()), int(np.median(shorter)), int(shorter.max()))
    return ImageSummary(len(source), height, width, all(grey), variety, sides)


def count_copies(source: ImageSource) -> tuple[int, int]:
    """How many files of the source equal an earlier one byte by byte, and how many were compared in a few seconds."""
    started, seen, compared = time.monotonic(), set[bytes](), 0
    for index in range(min(len(source), COMPARED)):
        try:
            encoded = source.encoded(index)[1]
        except UserError:
            continue
        seen.add(hashlib.blake2b(encoded, digest_size=16).digest())
        compared += 1
        if time.monotonic() - started > COMPARING_SECONDS:
            break
    return compared - len(seen), compared


def different_images(count: int, copies: int, compared: int) -> int:
    """Number of images of ``count`` that differ, if the share of copies is that of the compared ones; at least 1."""
    return max(round(count * (1 - copies / compared)), 1) if copies else count


def describe_copies(copies: int, compared: int) -> str:
    """A sentence about copies among the compared files."""
    return (
        f"{copies} of {compared} images looked at are copies of others and add no information: sslkit data check "
        "lists them"
    )


def check_alpha(source: ImageSource) -> Finding:
    """Count images with an alpha channel; warn if the run trains on the colours of transparent pixels."""
    if source.channels is not None:
        return ALPHA.not_applicable("the images are not read as RGB, so alpha is a channel like the others")
    alpha, sentence = count_alpha(source)[0], describe_alpha(source)
    if alpha and source.background == KEEP:
        return ALPHA.warning(f'{sentence}; to hide the colours of transparent pixels, set data.background = "white"')
    return ALPHA.ok(sentence)


def _is_grey(image: NDArray[np.uint8]) -> bool:
    return bool(np.ptp(image.astype(np.int16), axis=2).max(initial=0) <= 2)


def check_view_settings(views: ViewsConfig, images: ImageSummary, patch: int = 1) -> list[Finding]:
    """Compare the ``[views]`` table with the size and colour of the images; ``patch`` as of `patch_size`."""
    copies = [_variety(images, images.variety)] if images.variety else []
    return [*copies, _colour(views, images), _crops(views, images), _size(views, images, patch), _blur(views)]


def _variety(images: ImageSummary, variety: Variety) -> Finding:
    alarms = data_alarm(*astuple(variety))
    if not alarms and images.copies:
        sentence = describe_copies(images.copies, images.compared)
        return COPIES.warning(sentence) if images.copies > images.compared * MANY_COPIES else COPIES.ok(sentence)
    if not alarms:
        return COPIES.ok(f"{variety.different} of {variety.sampled} sampled images differ")
    sentence = alarms[0].partition(": ")[2]
    is_hopeless = min(variety.different, variety.sampled - variety.plain) <= 1
    return COPIES.fault(sentence) if is_hopeless else COPIES.warning(sentence)


def _colour(views: ViewsConfig, images: ImageSummary) -> Finding:
    if not images.grey:
        return COLOUR.ok("the images have colour")
    used = sorted({name for policy in views.view_policies() for name in _colour_steps(policy)}, reverse=True)
    if not used:
        return COLOUR.ok("the images are greyscale, and no transform changes colour")
    return COLOUR.warning(
        f"the images are greyscale, so {', '.join(used)} cost time without effect: set views.jitter = "
        f"{[*views.jitter[:2], 0, 0]} and views.gray_prob = 0"
    )


def _crops(views: ViewsConfig, images: ImageSummary) -> Finding:
    area, size = images.height * images.width, f"{images.width} x {images.height}"
    if all(policy.crop_sampler == "none" for policy in views.view_policies()):
        return CROPS.not_applicable("a pipeline file crops")
    for role, policy in zip(views.roles(), views.view_policies(), strict=True):
        side = (policy.crop_scale[0] * area) ** 0.5
        if side < SMALLEST_CROP:
            key = f"{role}.crop_scale" if role == "local" else "crop_scale"
            fitting = float(f"{min((SMALLEST_CROP * 1.5) ** 2 / area, 1.0):.2g}")
            largest = policy.crop_scale[1] if role == "local" or policy.crop_scale[1] >= SMALLEST_LARGEST else 1.0
            return CROPS.warning(
                f"the smallest crops of images of {size} pixels have {side:.0f} pixels per side, too few to show "
                f"anything: set views.{key} = {[fitting, max(largest, fitting)]}"
            )
    smallest, largest = views.crop_scale
    if largest < SMALLEST_LARGEST:
        return CROPS.warning(f"no crop covers over {largest:.0%} of an image: set views.crop_scale = {[smallest, 1.0]}")
    side = (smallest * area) ** 0.5
    return CROPS.ok(f"the smallest have about {side:.0f} pixels per side, from images of {size} pixels")


def _size(views: ViewsConfig, images: ImageSummary, patch: int) -> Finding:
    size, short_side = f"{images.width} x {images.height}", min(images.height, images.width)
    better = whole_patches(max(-(-short_side // 32) * 32, SMALLEST_VIEW), patch)
    if views.size > max(2 * short_side, SMALLEST_VIEW, better):
        return SIZE.warning(
            f"images of {size} pixels are enlarged to views of {views.size}, which take "
            f"{(views.size / better) ** 2:.0f} times the computation of {better}: set views.size = {better}"
        )
    return SIZE.ok(f"{views.size} pixels, from images of {size} pixels")


def _blur(views: ViewsConfig) -> Finding:
    blurred = any(policy.blur_prob and not policy.pipeline for policy in views.view_policies())
    if blurred and views.size <= 64 and views.blur_sigma[1] > views.size / 32:
        return BLUR.warning(
            f"a blur of up to {views.blur_sigma[1]:g} pixels, made for views of 224 pixels, removes most of views of "
            f"{views.size}: set views.blur_prob = 0"
        )
    return BLUR.ok("in proportion to the views" if blurred else "none")


def check_pixels(view: Tensor) -> Finding:
    """Check mean and standard deviation of a normalised view (B, C, H, W)."""
    mean, std = float(view.mean()), float(view.std())
    if abs(mean) > 4 or not 0.02 < std < 10:
        return PIXELS.warning(
            f"after normalisation their mean is {mean:.3g} and their standard deviation {std:.3g}, not about 0 and 1: "
            "give views.mean and views.std for pixels in [0, 1], such as [0.485, 0.456, 0.406]"
        )
    return PIXELS.ok(f"mean {mean:.2f}, standard deviation {std:.2f} after normalisation")


def _colour_steps(policy: ViewPolicy) -> list[str]:
    """The transforms of a view that change only images with colour."""
    if policy.pipeline:
        return []
    jitter = [name for name, strength in zip(("saturation", "hue"), policy.jitter[2:], strict=True) if strength > 0]
    return (jitter if policy.jitter_prob else []) + (["gray_prob"] if policy.gray_prob else [])
