"""Choose the columns of images and labels: those the user names, or else by type and usual names."""

from collections.abc import Iterable
from dataclasses import dataclass

import datasets

from sslkit.data.config import SourceConfig
from sslkit.data.formats.mask_files import is_annotation
from sslkit.errors import UserError, near_miss

# Usual names in order of preference: of columns typed as images or classes, and of columns of other types.
IMAGES = (
    *("image", "img", "picture", "photo", "pixel_values", "images", "imgs", "pixels", "jpg", "jpeg", "png", "webp"),
    *("rgb", "input_image", "image_bytes", "img_bytes"),
)
UNTYPED_IMAGES = ("image", "img", "jpg", "png", "jpeg", "webp")
LABELS = ("label", "labels", "cls", "fine_label", "class", "category", "target")
UNTYPED_LABELS = ("label", "labels", "cls", "fine_label", "coarse_label")


@dataclass(frozen=True)
class Columns:
    """The chosen columns of a table."""

    image: str
    label: str | None
    other_images: tuple[str, ...] = ()  # other columns that hold images
    other_labels: tuple[str, ...] = ()  # other columns that hold classes
    unlabelled: str = ""  # why there is no label column; empty if there is one

    def summary(self) -> str:
        """The chosen columns and the alternatives, for messages."""
        label = "no label column" if self.label is None else f"label column {self.label!r}"
        return f"image column {self.image!r}{_also(self.other_images)}, {label}{_also(self.other_labels)}"


def _also(names: Iterable[str]) -> str:
    listed = ", ".join(map(repr, names))
    return f" (also there: {listed})" if listed else ""


def choose_columns(features: datasets.Features, config: SourceConfig, hint: str = "") -> Columns:
    """Choose the columns that ``config`` names, or else those of the right type or with usual names.

    If no column holds images, several do and no name decides, or a given name does not exist, raise `UserError`. The
    ``hint`` is appended to its message if no column holds images.
    """
    image, other_images = _image_column(features, config, hint)
    label, other_labels, unlabelled = _label_column(features, config, image)
    return Columns(image, label, tuple(other_images), tuple(other_labels), unlabelled)


def _image_column(features: datasets.Features, config: SourceConfig, hint: str) -> tuple[str, list[str]]:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usual = _ranked(typed, IMAGES)
    plain = [name for name in typed if not is_annotation(name)]
    untyped = _ranked(features, UNTYPED_IMAGES)
    found = usual or (plain if len(plain) == 1 else []) or (untyped if not plain else [])
    if config.image_column is not None:
        chosen = _named_column(features, "image_column", config.image_column)
    elif found or len(typed) == 1:
        chosen = (found or typed)[0]
    elif typed:
        raise UserError(
            f"[data] image_column: several columns hold images, {typed[:12]}, and none has a usual name; name one, "
            f'such as image_column = "{(plain or typed)[0]}" (--image-column {(plain or typed)[0]})'
        )
    else:
        lists = [name for name, feature in features.items() if _holds_image(feature)]
        if lists:
            hint = f" ({lists[0]!r} holds several images a row; write a row for each image){hint}"
        raise UserError(
            f"[data] image_column: no column of images found among {list(features)}; name it by image_column{hint}"
        )
    return chosen, [name for name in typed if name != chosen]


def _holds_image(feature: object) -> bool:
    """Whether the elements of a list are images."""
    inner = getattr(feature, "feature", None)
    return isinstance(inner, datasets.Image) or (inner is not None and _holds_image(inner))


def _label_column(features: datasets.Features, config: SourceConfig, image: str) -> tuple[str | None, list[str], str]:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    untyped = [name for name in _ranked(features, UNTYPED_LABELS) if not isinstance(features[name], datasets.Image)]
    candidates = [name for name in dict.fromkeys(typed + untyped) if name != image]
    usual = _ranked(typed, LABELS)
    chosen, problem = None, ""
    if config.label_column is not None:
        chosen = _named_column(features, "label_column", config.label_column)
    elif usual or len(typed) == 1 or (untyped and not typed):
        chosen = (usual or typed or untyped)[0]
    elif typed:
        problem = (
            f"several columns hold classes, {typed[:12]}, and none has a usual name; name one, such as "
            f'--label-column {typed[0]} or [data] label_column = "{typed[0]}"'
        )
    else:
        listed = list(features)[:12]
        problem = f"no column of classes found among {listed}; name it by --label-column or [data] label_column"
    return chosen, [name for name in candidates if name != chosen], problem


def _ranked(names: Iterable[str], usual: tuple[str, ...]) -> list[str]:
    """Those of the names that are in ``usual``, ignoring case, in the order of ``usual``."""
    return sorted((name for name in names if name.lower() in usual), key=lambda name: usual.index(name.lower()))


def _named_column(features: datasets.Features, key: str, name: str) -> str:
    """Return ``name`` if there is such a column, else raise `UserError`."""
    if name not in features:
        raise UserError(f"[data] {key}: no column {name!r}{near_miss(name, features)}; there are {list(features)}")
    return name
