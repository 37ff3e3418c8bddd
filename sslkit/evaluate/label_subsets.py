"""A few labelled images of many: the 1 % and 10 % of semi-supervised learning, or n of each class."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError, check_path
from sslkit.random_draws import DrawPurpose


def choose_subset(source: ImageSource, labels: NDArray[np.int64], words: str, seed: int) -> NDArray[np.int64]:
    """Positions, ascending, of the images that ``words`` asks for.

    Args:
        source: Labelled images.
        labels: (N,) class numbers.
        words: ``"all"``; a share such as ``"10%"`` of every class, at least one of each; ``"5-shot"``, five of every
            class; or a text file that names images, one a line, as SimCLR's published lists do.
        seed: Of the draw. A share holds every smaller share of the same seed, and so do shots.

    Raises:
        UserError: Words not understood, a class with too few images, or a list naming images that are not there.
    """
    if not words:
        raise UserError("--labels: write 10%, 5-shot, all or a file that names images, not nothing")
    check_path(words, "--labels")
    if words == "all":
        return np.arange(len(labels))
    if words.endswith("%"):
        share = _number(words, words.removesuffix("%")) / 100
        if not 0 < share <= 1:
            raise UserError(f"--labels {words}: a share must lie above 0 % and not above 100 %")
        return _of_each_class(labels, seed, lambda count: max(round(share * count), 1))
    if words.endswith("-shot"):
        shots = _number(words, words.removesuffix("-shot"))
        if not shots >= 1 or not shots.is_integer():
            raise UserError(f"--labels {words}: a whole number of images of each class, such as 5-shot")
        fewest = min(Counter(labels.tolist()).values())
        if shots > fewest:
            raise UserError(f"--labels {words}: the smallest class has {fewest} images; take at most that many")
        return _of_each_class(labels, seed, lambda _count: int(shots))
    return _listed(source, Path(words))


def _number(words: str, digits: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise UserError(f"--labels {words}: {digits!r} is not a number; write 10%, 5-shot, all or a file") from None


def _of_each_class(labels: NDArray[np.int64], seed: int, how_many: Callable[[int], int]) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, DrawPurpose.LABEL_SUBSET]).permutation(len(labels))
    chosen = []
    for number in np.unique(labels):
        members = order[labels[order] == number]
        chosen.append(members[: how_many(len(members))])
    return np.sort(np.concatenate(chosen))


def _listed(source: ImageSource, file: Path) -> NDArray[np.int64]:
    """Images whose path, or its last one, two or three parts, stand in ``file``."""
    if not file.is_file():
        raise UserError(f"--labels {file}: no such file; write 10%, 5-shot, all or a file that names images")
    try:
        wanted = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {file}: is not a text file that can be read: {error}") from error
    if not wanted:
        raise UserError(f"--labels {file}: names no image; write one name a line")
    positions: dict[str, list[int]] = {}
    for index, path in enumerate(source.paths()):
        parts = Path(path).parts
        for name in {path, *("/".join(parts[-length:]) for length in (1, 2, 3))}:
            positions.setdefault(name, []).append(index)
    wanted = [name if name in positions else name.replace("\\", "/") for name in wanted]  # a list made on Windows
    absent = [name for name in wanted if name not in positions]
    if absent:
        raise UserError(
            f"--labels {file}: {len(absent)} of its {len(wanted)} names are not in {source.description}, "
            f"the first is {absent[0]!r}"
        )
    twice = [name for name in wanted if len(positions[name]) > 1]
    if twice:
        raise UserError(
            f"--labels {file}: {twice[0]!r} names {len(positions[twice[0]])} images; give their folders too"
        )
    return np.unique([positions[name][0] for name in wanted])
