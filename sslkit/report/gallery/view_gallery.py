"""A page of views: what the augmentations do to the user's images, and every step in words."""

from dataclasses import dataclass
from typing import Any

from sslkit.data.augment.user_pipeline import NAME, short_name
from sslkit.data.augment.view_layers import ROLES
from sslkit.data.augment.views_config import NUM_GLOBAL_VIEWS, ViewPolicy, ViewsConfig
from sslkit.data.sources.image_source import open_source
from sslkit.doctor.image_checks import check_view_settings, summarise_images
from sslkit.engine.logging.sample_images import example_views
from sslkit.recipe.resolve import Recipe
from sslkit.report.gallery.thumbnails import data_uri
from sslkit.text import pluralize

SIDE = 144  # pixels
NUM_LOCAL_SHOWN = 2  # of the local views, which are all made in the same way
SAMPLERS = {
    "torchvision": "",
    "clamped": ", cut to the image where it does not fit",
    "tensorflow": ", drawn as TensorFlow does: more often small",
}


@dataclass(frozen=True)
class ViewColumn:
    """A view's name and its pictures, one per epoch."""

    name: str
    pictures: list[str]


@dataclass(frozen=True)
class ViewRow:
    """An image, its size, and its views."""

    original: str
    size: str
    views: list[ViewColumn]


@dataclass(frozen=True)
class ViewGallery:
    """The views of a recipe, the steps that make each, and the warnings of the doctor."""

    title: str
    steps: list[tuple[str, list[str]]]
    advice: list[str]
    rows: list[ViewRow]


def draw_views(recipe: Recipe) -> ViewGallery:
    """Make the views of a few images that the first epochs of the run see.

    Raises `UserError` if the data cannot be read or a pipeline file does not work.
    """
    source, config = open_source(recipe.data).without_labels(), recipe.views
    counts = {"global": NUM_GLOBAL_VIEWS, "local": min(config.local.count, NUM_LOCAL_SHOWN)}
    names = [f"{role} view {number + 1}" for role, count in counts.items() for number in range(count)]
    rows = []
    for example in example_views(recipe, source, len(names)):
        columns = [
            ViewColumn(name, [data_uri(views[index], SIDE) for views in example.epochs])
            for index, name in enumerate(names)
        ]
        height, width = example.image.shape[:2]
        rows.append(ViewRow(data_uri(example.image, SIDE), f"{width} x {height}", columns))
    findings = check_view_settings(config, summarise_images(source))
    advice = [finding.sentence for finding in findings if finding.verdict == "warning"]
    return ViewGallery(f"Policy {config.policy}, {source.description}", describe_views(config), advice, rows)


def describe_views(config: ViewsConfig) -> list[tuple[str, list[str]]]:
    """The steps of each view in words, in the order of the pipeline; views that are made alike come together."""
    first, second, local = (_steps(config.policy_of(role)) for role in ROLES)
    if first == second:
        described = [("both global views", first)]
    else:
        described = [("global view 1", first), ("global view 2", second)]
    if count := config.local.count:
        described.append((pluralize(count, "local view"), local))
    return described


def _steps(policy: ViewPolicy) -> list[str]:
    if policy.pipeline:
        file = f"pipeline file, sha256 {policy.pipeline.pipeline_sha256[:12]}"
        return [_crop(policy), file, *map(_transform, policy.pipeline.transforms())]
    jitter = (policy.jitter_prob if any(policy.jitter) else 0.0, "colours jittered", f": {_jitter(policy)}")
    gray = (policy.gray_prob, "converted to grey", "")
    blur = f" by a Gaussian of {policy.blur_sigma[0]:g} to {policy.blur_sigma[1]:g} pixels"
    angle = f" by up to {policy.rotate_degrees:g} degrees in either direction"
    hole = f": a rectangle of {policy.erase_scale[0]:.0%} to {policy.erase_scale[1]:.0%} of the area"
    steps = [
        *([gray, jitter] if policy.gray_first else [jitter, gray]),
        (policy.blur_prob, "blurred", blur),
        (policy.solarize_prob, "solarized", ": values from 128 up inverted"),
        (policy.flip_prob, "mirrored", " left to right"),
        (float(policy.rotate_degrees > 0), "rotated", angle),
        (policy.erase_prob, "erased in part", hole),
    ]
    taken = [f"{_often(probability)} {what}{how}" for probability, what, how in steps if probability]
    never = [what for probability, what, _ in steps if not probability]
    return [_crop(policy), *taken, *([f"never {', '.join(never)}"] if never else [])]


def _crop(policy: ViewPolicy) -> str:
    if policy.crop_sampler == "none":
        return f"the whole image; what the pipeline makes of it is resized to {policy.size} x {policy.size} pixels"
    low, high = policy.crop_scale
    narrow, wide = policy.crop_ratio
    return (
        f"a crop of {low:.0%} to {high:.0%} of the area, {narrow:.2f} to {wide:.2f} times as wide as high"
        f"{SAMPLERS[policy.crop_sampler]}, resized to {policy.size} x {policy.size} pixels ({policy.interpolation}"
        f"{'' if policy.resize == 'antialias' else ', not antialiased'})"
    )


def _jitter(policy: ViewPolicy) -> str:
    brightness, contrast, saturation, hue = policy.jitter
    added = policy.brightness == "add"
    factors = [("brightness", 0.0 if added else brightness), ("contrast", contrast), ("saturation", saturation)]
    parts = [f"brightness plus or minus {brightness:g} of the full scale"] if added and brightness else []
    parts += [f"{name} times {max(1 - strength, 0):g} to {1 + strength:g}" for name, strength in factors if strength]
    return ", ".join(parts + ([f"hue shifted by up to {360 * hue:.0f} degrees of 360"] if hue else []))


def _transform(transform: dict[str, Any]) -> str:
    """A transform of a pipeline file with its arguments, or a composition with the transforms in it."""
    name = short_name(transform[NAME])
    inner = "; ".join(_transform(each) for each in transform.get("transforms", []))
    left_out = (NAME, "p", "transforms")
    arguments = [f"{key} {value}" for key, value in transform.items() if key not in left_out and value is not None]
    how = f": {', '.join(arguments)}" if arguments else ""
    return f"{_often(transform.get('p', 0.5))} {name}{how}{f' of ({inner})' if inner else ''}"


def _often(probability: float) -> str:
    return "always" if probability == 1 else f"in {100 * probability:.3g}% of draws"
