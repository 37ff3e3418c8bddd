"""What the augmentations really do to the user's images, and what they are asked to do, in words."""

from dataclasses import dataclass

import numpy as np

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.policies import LARGE_VIEWS, PerView, ViewsConfig
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import open_source
from sslkit.doctor.image_checks import check_view_settings, summarise_images
from sslkit.recipe.resolve import Recipe
from sslkit.report.thumbnails import data_uri

NUM_IMAGES, NUM_DRAWS, SIDE = 8, 3, 144
SAMPLERS = {
    "torchvision": "",
    "clamped": ", cut to the image where it does not fit",
    "tensorflow": ", drawn as TensorFlow does: more often small",
}
SHOWN_SMALL = 2  # of SwAV's six small crops, which are alike


@dataclass(frozen=True)
class ViewColumn:
    """A view and its pictures: one a draw."""

    name: str
    pictures: list[str]


@dataclass(frozen=True)
class ViewRow:
    """An image as it is, its size, and its views."""

    original: str
    size: str
    views: list[ViewColumn]


@dataclass(frozen=True)
class ViewGallery:
    """Everything about a recipe's views.

    Attributes:
        title: Policy and data.
        words: Each view's name and what is done to make it, step by step.
        advice: What the doctor says against these numbers on these images.
        rows: Images and their views.
    """

    title: str
    words: list[tuple[str, list[str]]]
    advice: list[str]
    rows: list[ViewRow]


def draw_views(recipe: Recipe) -> ViewGallery:
    """Cut views of a few images, spread over the data: the very ones that the run's first epochs see.

    Raises:
        UserError: The data cannot be read.
    """
    source, config = open_source(recipe.data).without_labels(), recipe.views
    pipeline = ViewPipeline(config, recipe.train.seed)
    names = view_names(config)
    shown = [view for view in range(len(names)) if view < LARGE_VIEWS + SHOWN_SMALL]
    rows = []
    for sample in np.linspace(0, len(source) - 1, min(NUM_IMAGES, len(source)), dtype=int).tolist():
        image = read_or_replace(source, recipe.train.seed, epoch=0, sample=sample).pixels
        columns = [
            ViewColumn(
                names[view], [data_uri(pipeline.cut(image, epoch, sample, view), SIDE) for epoch in range(NUM_DRAWS)]
            )
            for view in shown
        ]
        rows.append(ViewRow(data_uri(image, SIDE), f"{image.shape[1]} x {image.shape[0]}", columns))
    advice = [
        finding.sentence
        for finding in check_view_settings(config, summarise_images(source))
        if finding.verdict == "warning"
    ]
    return ViewGallery(f"Policy {config.policy}, {source.description}", describe_views(config), advice, rows)


def view_names(config: ViewsConfig) -> list[str]:
    """What each view is called."""
    small = [f"small view {number + 1}" for number in range(config.small_crops)]
    return [f"view {number + 1}" for number in range(LARGE_VIEWS)] + small


def describe_views(config: ViewsConfig) -> list[tuple[str, list[str]]]:
    """Every step of each view in words, in the order of the pipeline; views that are made alike are told together."""
    kinds = [("view 1", 0), ("view 2", 1)]
    if config.small_crops:
        kinds.append((f"{config.small_crops} small views", LARGE_VIEWS))
    told = [(name, _steps(config, view)) for name, view in kinds]
    if told[0][1] == told[1][1]:
        told[:2] = [("view 1 and view 2, alike", told[0][1])]
    return told


def _steps(config: ViewsConfig, view: int) -> list[str]:
    small = view >= LARGE_VIEWS
    side = config.small_size if small else config.size
    low, high = config.small_scale if small else config.crop_scale
    narrow, wide = config.crop_ratio
    crop = (
        f"a crop of {low:.0%} to {high:.0%} of the area, {narrow:.2f} to {wide:.2f} times as wide as high"
        f"{SAMPLERS[config.crop_sampler]}, resized to {side} x {side} pixels ({config.interpolation}"
        f"{'' if config.resize == 'antialias' else ', not antialiased'})"
    )
    jitter = (
        _share(config.jitter_prob, view) if any(config.jitter) else 0.0,
        "colours jittered",
        f": {_jitter(config)}",
    )
    grey = (_share(config.gray_prob, view), "turned grey", "")
    blur = f" by a Gaussian of {config.blur_sigma[0]:g} to {config.blur_sigma[1]:g} pixels"
    hole = f": a rectangle of {config.erase_scale[0]:.0%} to {config.erase_scale[1]:.0%} of the area"
    steps = [
        *([grey, jitter] if config.gray_first else [jitter, grey]),
        (_share(config.blur_prob, view), "blurred", blur),
        (_share(config.solarize_prob, view), "solarised", ": values from 128 up inverted"),
        (_share(config.flip_prob, view), "mirrored", " left to right"),
        (float(config.rotate_degrees > 0), "rotated", f" by up to {config.rotate_degrees:g} degrees to either side"),
        (_share(config.erase_prob, view), "blanked in part", hole),
    ]
    told = [f"{_often(share)} {what}{how}" for share, what, how in steps if share]
    never = [what for share, what, _ in steps if not share]
    return [crop, *told, *([f"never {', '.join(never)}"] if never else [])]


def _jitter(config: ViewsConfig) -> str:
    brightness, contrast, saturation, hue = config.jitter
    added = config.brightness == "add"
    factors = [("brightness", 0.0 if added else brightness), ("contrast", contrast), ("saturation", saturation)]
    parts = [f"brightness plus or minus {brightness:g} of the full scale"] if added and brightness else []
    parts += [f"{name} times {max(1 - strength, 0):g} to {1 + strength:g}" for name, strength in factors if strength]
    return ", ".join(parts + ([f"hue turned by up to {360 * hue:.0f} degrees of 360"] if hue else []))


def _share(probability: PerView, view: int) -> float:
    return probability[min(view, 1)] if isinstance(probability, tuple) else probability


def _often(share: float) -> str:
    return "always" if share == 1 else f"in {100 * share:.3g}% of draws"
