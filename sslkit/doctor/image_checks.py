"""What the user's images are like, and whether the views suit them."""

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.augment.views_config import ViewPolicy, ViewsConfig
from sslkit.data.decode.background import KEEP
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.inspection import count_alpha, describe_alpha
from sslkit.doctor.findings import Finding, fault, not_applicable, ok, warning
from sslkit.engine.monitor.alarms import data_alarm
from sslkit.engine.monitor.image_variety import Variety, variety_of

ALPHA = "alpha"
COPIES = "copies"
COLOUR, CROPS, SIZE, BLUR, PIXELS = "colour", "crops", "view size", "blur", "pixel values"

LOOKED_AT = 32
SMALLEST_CROP = 8.0  # pixels: the CIFAR-10 recipes, which work, go down to 9


@dataclass(frozen=True)
class ImageFacts:
    """What was seen of a source.

    Attributes:
        count: Images in it.
        height: Median height in pixels.
        width: Median width.
        grey: Whether no image looked at has colour.
        variety: How different those looked at are; None: not known.
    """

    count: int
    height: int
    width: int
    grey: bool
    variety: Variety | None = None

    @property
    def short_side(self) -> int:
        """The shorter of height and width."""
        return min(self.height, self.width)


def look_at(source: ImageSource) -> ImageFacts:
    """Read a few images, spread over the source."""
    indices = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source)), dtype=int)
    images = [source.read(int(index)) for index in indices]
    height, width = (int(np.median([image.shape[axis] for image in images])) for axis in (0, 1))
    return ImageFacts(len(source), height, width, all(_is_grey(image) for image in images), variety_of(images))


def check_alpha(source: ImageSource) -> Finding:
    """Say how many images have alpha, and warn where the colours under it are learned from."""
    if source.channels is not None:
        return not_applicable(ALPHA, "a channel like others in images that are not read as RGB")
    alpha, sentence = count_alpha(source)[0], describe_alpha(source)
    return warning(ALPHA, sentence) if alpha and source.background == KEEP else ok(ALPHA, sentence)


def _is_grey(image: NDArray[np.uint8]) -> bool:
    return bool(np.ptp(image.astype(np.int16), axis=2).max(initial=0) <= 2)


def advise_on_views(views: ViewsConfig, facts: ImageFacts) -> list[Finding]:
    """Everything that `[views]` and the images' size and colour say together."""
    found = [_colour(views, facts), _crops(views, facts), _size(views, facts), _blur(views)]
    return [*([_variety(facts.variety)] if facts.variety else []), *found]


def _variety(variety: Variety) -> Finding:
    alarms = data_alarm(*astuple(variety))
    if not alarms:
        return ok(COPIES, f"{variety.different} different ones of {variety.sampled} looked at")
    sentence = alarms[0].partition(": ")[2]
    return (
        fault(COPIES, sentence)
        if min(variety.different, variety.sampled - variety.plain) <= 1
        else warning(COPIES, sentence)
    )


def _colour(views: ViewsConfig, facts: ImageFacts) -> Finding:
    if not facts.grey:
        return ok(COLOUR, "the images have colour")
    used = sorted({name for policy in views.view_policies() for name in _colour_steps(policy)}, reverse=True)
    if not used:
        return ok(COLOUR, "the images are grey, and no transform changes colour")
    return warning(
        COLOUR,
        f"the images are grey: {', '.join(used)} change nothing and cost time; set the last two numbers of [views] "
        "jitter and gray_prob to 0 (policy small_gray does)",
    )


def _crops(views: ViewsConfig, facts: ImageFacts) -> Finding:
    area = facts.height * facts.width
    if all(policy.crop_sampler == "none" for policy in views.view_policies()):
        return not_applicable(CROPS, "a pipeline file crops")
    for role, policy in zip(views.roles(), views.view_policies(), strict=True):
        key = f"{role}.crop_scale" if role == "local" else "crop_scale"
        smallest = policy.crop_scale[0]
        side = (smallest * area) ** 0.5
        if side < SMALLEST_CROP:
            fitting = min((SMALLEST_CROP * 1.5) ** 2 / area, 1.0)
            return warning(
                CROPS,
                f"[views] {key} starts at {smallest:g}: of images of {facts.width} x {facts.height} that is {side:.0f} "
                f"pixels a side, too few to tell what they show; start at {fitting:.2g} or more",
            )
    if views.crop_scale[1] < 0.3:
        return warning(
            CROPS, f"[views] crop_scale ends at {views.crop_scale[1]:g}: no view ever shows most of an image"
        )
    side = (views.crop_scale[0] * area) ** 0.5
    return ok(CROPS, f"the smallest are about {side:.0f} pixels a side, of images of {facts.width} x {facts.height}")


def _size(views: ViewsConfig, facts: ImageFacts) -> Finding:
    if views.size > 2 * facts.short_side:
        return warning(
            SIZE,
            f"views of {views.size} pixels are cut from images of {facts.width} x {facts.height}: most of the "
            f"computing goes into enlarged pixels; [views] size = {_round_up(facts.short_side)} shows as much",
        )
    return ok(SIZE, f"{views.size} pixels, from images of {facts.width} x {facts.height}")


def _blur(views: ViewsConfig) -> Finding:
    blurred = any(policy.blur_prob and not policy.pipeline for policy in views.view_policies())
    if blurred and views.size <= 64 and views.blur_sigma[1] > views.size / 32:
        return warning(
            BLUR,
            f"a blur of up to {views.blur_sigma[1]:g} pixels leaves little of views of {views.size} pixels; the "
            "papers' is for 224: set [views] blur_prob to 0 or blur_sigma lower",
        )
    return ok(BLUR, "in proportion to the views" if blurred else "none")


def check_pixels(prepared: Tensor) -> Finding:
    """Normalised pixels must lie where networks expect them.

    Args:
        prepared: (B, 3, H, W), as the backbone sees them.
    """
    mean, std = float(prepared.mean()), float(prepared.std())
    if abs(mean) > 4 or not 0.02 < std < 10:
        return warning(
            PIXELS,
            f"after normalisation they have mean {mean:.3g} and deviation {std:.3g}; near 0 and 1 is right. [views] "
            "mean and std are for pixels in [0, 1], not in [0, 255]",
        )
    return ok(PIXELS, f"mean {mean:.2f}, deviation {std:.2f} after normalisation")


def _colour_steps(policy: ViewPolicy) -> list[str]:
    """The steps of a view that only change coloured images."""
    if policy.pipeline:
        return []
    jitter = [name for name, strength in zip(("saturation", "hue"), policy.jitter[2:], strict=True) if strength > 0]
    return (jitter if policy.jitter_prob else []) + (["gray_prob"] if policy.gray_prob else [])


def _round_up(pixels: int) -> int:
    return -(-pixels // 32) * 32
