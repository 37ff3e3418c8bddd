"""Which column of a table holds the images, and which their classes: by type and usual names, or as the user says."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import datasets

from sslkit.data.config import SourceConfig
from sslkit.errors import UserError, near_miss

IMAGES = (
    *("image", "img", "picture", "photo", "pixel_values", "images", "imgs", "pixels", "jpg", "jpeg", "png", "webp"),
    *("rgb", "input_image", "image_bytes", "img_bytes"),
)
UNTYPED_IMAGES = ("image", "img", "jpg", "png", "jpeg", "webp")
LABELS = ("label", "labels", "cls", "fine_label", "class", "category", "target")
UNTYPED_LABELS = ("label", "labels", "cls", "fine_label", "coarse_label")
ANNOTATIONS = frozenset(
    (
        *("mask", "masks", "annotation", "annotations", "annot", "label", "labels", "seg", "segm", "segment"),
        *("segmentation", "segmentations", "semantic", "instance", "panoptic", "gt", "groundtruth", "truth", "depth"),
        *("normal", "normals", "edge", "edges", "flow", "heatmap", "saliency", "trimap", "alpha", "matte", "disparity"),
        *("thumbnail", "thumb", "overlay", "conditioning"),
    )
)


@dataclass(frozen=True)
class Columns:
    """What was chosen of a table.

    Attributes:
        image: The column of images.
        label: The column of classes, or None.
        other_images: Other columns that hold images.
        other_labels: Other columns that hold classes.
        unlabelled: Why there is no column of classes; empty where there is one.
    """

    image: str
    label: str | None
    other_images: tuple[str, ...] = ()
    other_labels: tuple[str, ...] = ()
    unlabelled: str = ""

    def words(self) -> str:
        """What was chosen, and what else there is."""
        image = f"image column {self.image!r}{_also(self.other_images)}"
        if self.label is not None:
            return f"{image}, label column {self.label!r}{_also(self.other_labels)}"
        return f"{image}, no label column{_also(self.other_labels)}"


def _also(names: Iterable[str]) -> str:
    listed = ", ".join(map(repr, names))
    return f" (also there: {listed})" if listed else ""


def is_annotation(name: str) -> bool:
    """Whether a name says that its pictures are drawn over images: masks, depths, labels."""
    return bool(ANNOTATIONS & set(re.findall("[a-z]+", name.lower())))


def choose_columns(features: datasets.Features, config: SourceConfig, hint: str = "") -> Columns:
    """The columns that ``config`` names, or else those of the right type or of usual names.

    Args:
        features: All columns and their types.
        config: What was asked for.
        hint: What else to do where no column holds images.

    Raises:
        UserError: None holds images, or several do and no name tells which; or there is none of the name given.
    """
    image, other_images = _image_column(features, config, hint)
    label, other_labels, unlabelled = _label_column(features, config, image)
    return Columns(image, label, tuple(other_images), tuple(other_labels), unlabelled)


def _image_column(features: datasets.Features, config: SourceConfig, hint: str) -> tuple[str, list[str]]:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if config.image_column is not None:
        chosen = named_column(features, "image_column", config.image_column)
        return chosen, [name for name in typed if name != chosen]
    usual = _ranked(typed, IMAGES)
    plain = [name for name in typed if not is_annotation(name)]
    named = _ranked(features, UNTYPED_IMAGES)
    if usual:
        chosen = usual[0]
    elif len(plain) == 1:
        chosen = plain[0]
    elif named and not plain:
        chosen = named[0]
    elif len(typed) == 1:
        chosen = typed[0]
    elif typed:
        raise UserError(
            f"[data] image_column: several columns hold images, {typed[:12]}, and none is called as usual; say which, "
            f'such as image_column = "{(plain or typed)[0]}" (--image-column {(plain or typed)[0]})'
        )
    else:
        lists = [name for name, feature in features.items() if _holds_image(feature)]
        if lists:
            hint = f" ({lists[0]!r} holds several images a row; write a row for each image){hint}"
        there = f"{list(features)}; name it by image_column{hint}"
        raise UserError(f"[data] image_column: no column of images found among {there}")
    return chosen, [name for name in typed if name != chosen]


def _holds_image(feature: object) -> bool:
    """Whether a list or structure has images in it."""
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list):
        inner = feature[0]
    return isinstance(inner, datasets.Image) or (inner is not None and inner is not feature and _holds_image(inner))


def _label_column(features: datasets.Features, config: SourceConfig, image: str) -> tuple[str | None, list[str], str]:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in _ranked(features, UNTYPED_LABELS) if not isinstance(features[name], datasets.Image)]
    there = [name for name in dict.fromkeys(typed + named) if name != image]
    if config.label_column is not None:
        chosen = named_column(features, "label_column", config.label_column)
        return chosen, [name for name in there if name != chosen], ""
    usual = _ranked(typed, LABELS)
    if usual or len(typed) == 1 or (named and not typed):
        chosen = (usual or typed or named)[0]
        return chosen, [name for name in there if name != chosen], ""
    if typed:
        return None, there, (
            f"several columns hold classes, {typed[:12]}, and none is called as usual; say which, such as "
            f'--label-column {typed[0]} or [data] label_column = "{typed[0]}"'
        )  # fmt: skip
    return (
        None,
        there,
        f"no column of classes found among {list(features)[:12]}; say which by --label-column or [data] label_column",
    )


def _ranked(names: Iterable[str], usual: tuple[str, ...]) -> list[str]:
    """Those of the names that are usual, in any case of letters, the most usual first."""
    return sorted((name for name in names if name.lower() in usual), key=lambda name: usual.index(name.lower()))


def named_column(features: datasets.Features, key: str, name: str) -> str:
    """The column of a name that was given.

    Raises:
        UserError: There is none.
    """
    if name not in features:
        raise UserError(f"[data] {key}: no column {name!r}{near_miss(name, features)}; there are {list(features)}")
    return name
