"""Subsets of labelled images: 1 % or 10 % of each class, n per class, or the images in a list."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError, check_path
from sslkit.random_draws import DrawPurpose

FORMS = "10%, 5-shot, all, or a text file of image names"


def choose_subset(source: ImageSource, labels: NDArray[np.int64], subset: str, seed: int) -> NDArray[np.int64]:
    """Choose the images to train on from those with ``labels`` (N,). Returns their positions, ascending.

    ``subset`` is ``"all"``; a share of each class such as ``"10%"``, at least one image; ``"5-shot"``, five images of
    each class; or the path of a text file with one image name per line, such as SimCLR's published lists. With the same
    seed, a larger share contains every smaller share, and so for shots. Raises `UserError` if ``subset`` is none of
    these, a class has too few images, or a listed image does not exist.
    """
    if not subset:
        raise UserError(f"--labels: must not be empty; write {FORMS}")
    check_path(subset, "--labels")
    if subset == "all":
        return np.arange(len(labels))
    if subset.endswith("%"):
        share = _number(subset, "%") / 100
        if not 0 < share <= 1:
            raise UserError(f"--labels {subset}: the share must be above 0% and at most 100%")
        return _draw_per_class(labels, seed, lambda count: max(round(share * count), 1))
    if subset.endswith("-shot"):
        shots = _number(subset, "-shot")
        if not shots >= 1 or not shots.is_integer():
            raise UserError(f"--labels {subset}: must be a whole number of images per class, such as 5-shot")
        fewest = min(Counter(labels.tolist()).values())
        if shots > fewest:
            raise UserError(f"--labels {subset}: the smallest class has {fewest} images; take at most that many")
        return _draw_per_class(labels, seed, lambda _count: int(shots))
    return _listed(source, Path(subset))


def _number(subset: str, suffix: str) -> float:
    digits = subset.removesuffix(suffix)
    try:
        return float(digits)
    except ValueError:
        raise UserError(f"--labels {subset}: {digits!r} is not a number; write {FORMS}") from None


def _draw_per_class(labels: NDArray[np.int64], seed: int, how_many: Callable[[int], int]) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, DrawPurpose.LABEL_SUBSET]).permutation(len(labels))
    chosen = []
    for number in np.unique(labels):
        members = order[labels[order] == number]
        chosen.append(members[: how_many(len(members))])
    return np.sort(np.concatenate(chosen))


def _listed(source: ImageSource, file: Path) -> NDArray[np.int64]:
    """Images whose path, or the last one, two or three parts of it, are in ``file``."""
    if not file.is_file():
        raise UserError(f"--labels {file}: no such file; write {FORMS}")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {file}: cannot be read as a text file: {error}") from error
    if not names:
        raise UserError(f"--labels {file}: the file is empty; write one image name per line")
    positions: dict[str, list[int]] = {}
    for index, path in enumerate(source.paths()):
        parts = Path(path).parts
        for name in {path, *("/".join(parts[-length:]) for length in (1, 2, 3))}:
            positions.setdefault(name, []).append(index)
    names = [name if name in positions else name.replace("\\", "/") for name in names]  # a list made on Windows
    missing = [name for name in names if name not in positions]
    if missing:
        raise UserError(
            f"--labels {file}: {len(missing)} of its {len(names)} names are not in {source.description}, "
            f"the first is {missing[0]!r}"
        )
    if ambiguous := [name for name in names if len(positions[name]) > 1]:
        raise UserError(
            f"--labels {file}: {ambiguous[0]!r} is the name of {len(positions[ambiguous[0]])} images; add their folders"
        )
    return np.unique([positions[name][0] for name in names])
