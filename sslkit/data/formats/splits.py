"""Names of splits: which folders and files are told apart by them, for every kind of data.

A name counts by its words, in any case, as `datasets` takes them: ``train``, ``data/valid-00000-of-00001.parquet``,
``Training Images``, ``val2017``, ``seg_test``. The synonyms are those of the Hub, and held-out sets.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from sslkit.errors import UserError

ALL = "all"  # the split that takes everything, whatever its name
SYNONYMS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
    "holdout": ("holdout",),
}
SPLIT_OF = {word: split for split, words in SYNONYMS.items() for word in words}
ENDINGS = ("", "set", "sets", "data", "images", "imgs", "split")  # trainset, testdata
KEYWORDS = {word + ending: word for word in SPLIT_OF for ending in ENDINGS}
NEUTRAL = frozenset(
    (
        *("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "photos", "pictures", "pics", "files"),
        *(
            "samples",
            "split",
            "splits",
            "jpg",
            "jpeg",
            "png",
            "jpegimages",
            "original",
            "final",
            "full",
            "clean",
            "raw",
            "the",
        ),
        *("a", "b", "x", "y", "v"),
    )
)
DRAWN = frozenset(
    (
        *("mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "truth", "depth"),
        *("depths", "segmentation", "segmentations", "segmentationclass", "segmentationobject", "heatmaps"),
    )
)
# Words that a part of a data set is told by, beside that of its split: train_labeled, test_noisy. Others, after the
# word, make it another thing: train_station, test_kitchen.
PARTS = NEUTRAL | frozenset(
    (
        *("labeled", "labelled", "unlabeled", "unlabelled", "annotated", "extra", "small", "large", "mini", "tiny"),
        *(
            "big",
            "subset",
            "part",
            "fold",
            "noisy",
            "real",
            "synthetic",
            "synth",
            "fake",
            "new",
            "old",
            "all",
            "hr",
            "lr",
        ),
        *("crops", "cropped", "patches", "frames", "resized", "seen", "unseen", "easy", "hard", "public", "private"),
    )
)
HELD_OUT = re.compile(r"h[eo]ld[\W_]?outs?", re.IGNORECASE)
SIGN = re.compile("train|trn|test|tst|eval|val|dev|h[eo]ld", re.IGNORECASE)  # in every name that has a word of a split
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
ALL_HELP = (
    'if none of these names means a split, give split = "all" (--set data.split=all, --train-split all, --split all or '
    "[monitor] train_split)"
)

File = TypeVar("File", str, Path)


def words_of(name: str) -> list[str]:
    """The words of a name in small letters: runs of letters, ``trainA`` and ``held-out`` taken for what they are."""
    name = CAMEL.sub(" ", HELD_OUT.sub("_holdout_", name))
    return [word.lower() for word in re.findall(r"[^\W\d_]+", name)]


def split_words(name: str) -> list[str]:
    """The words of splits in a name, as `SPLIT_OF` has them; two of one split, as in test_eval, count once."""
    if not SIGN.search(name):  # nearly all; there may be a million names
        return []
    found = {SPLIT_OF[KEYWORDS[word]]: KEYWORDS[word] for word in reversed(words_of(name)) if word in KEYWORDS}
    return list(found.values())


def is_plain(name: str) -> bool:
    """Whether a name says a split and nothing else: ``train``, ``val2017``, ``Test Images``, not ``test_tube``."""
    return all(word in KEYWORDS or word in NEUTRAL for word in words_of(name))


def is_drawn(name: str) -> bool:
    """Whether a folder is called as one of pictures that are drawn over images, such as masks."""
    return bool(DRAWN.intersection(re.findall("[a-z]+", name.lower())))


def may_be_classes(names: Iterable[str]) -> bool:
    """Whether names with a word of a split may all mean something else, as ``train_station`` and ``test_kitchen`` do.

    In each the word comes first and one that tells no part of a data set follows, another one for each split: not so
    ``train_cats`` and ``test_cats``.
    """
    splits: dict[str, str] = {}
    for name in names:
        words = words_of(name)
        rest = [word for word in words[1:] if word not in PARTS]
        if len(split_words(name)) != 1 or words[0] not in KEYWORDS or not rest or rest != words[1:]:
            return False
        split = SPLIT_OF[KEYWORDS[words[0]]]
        if splits.setdefault(" ".join(rest), split) != split:
            return False
    return True


def choose(available: Iterable[str], asked: str) -> list[str]:
    """Those of the available split words that a split's name stands for.

    ``train``, ``test`` and ``validation`` stand for all their synonyms, any other word for itself, or else, if nothing
    is called so, for its synonyms.
    """
    words, asked = list(available), asked.lower()
    same = [word for word in words if word.lower() == asked]
    if same and SPLIT_OF.get(asked) != asked:
        return same
    split = SPLIT_OF.get(KEYWORDS.get(asked, asked))
    return [word for word in words if word in same or (split and SPLIT_OF.get(word.lower()) == split)]


def in_order(words: Iterable[str]) -> list[str]:
    """Split words with those of training first, then of test, validation and held-out sets, then unknown ones."""
    order = list(SYNONYMS)
    return sorted(set(words), key=lambda word: (order.index(SPLIT_OF[word]) if word in SPLIT_OF else len(order), word))


def splits_of_folders(names: Sequence[str], where: str) -> dict[str, str]:
    """Which split each of the folders side by side in one folder is of; empty where they are classes or the like.

    They are splits if each name has a word of one. Where only some have, the others stand in doubt: names that say a
    split and nothing else, and those alike but for the word (``photos_train`` and ``photos_test``), are refused beside
    others; else they are classes (``test_tube`` beside ``flask``).

    Args:
        names: Names of folders that hold images.
        where: How the message names the folder.

    Raises:
        UserError: Some are splits and others are not.
    """
    found = {name: split_words(name) for name in names}
    named = {name: words[0] for name, words in found.items() if len(words) == 1}
    others = [name for name in names if name not in named]
    if not named:
        return {}
    if not others:
        one_split = len({SPLIT_OF[word] for word in named.values()}) == 1
        classes = one_split and (not any(map(is_plain, named)) or (len(named) > 1 and "train" in named.values()))
        return {} if classes else named
    if not _are_splits(named, others):
        return {}
    raise UserError(
        f"[data] path: {where!r} has folders of splits and others: splits {sorted(named)[:8]}, others "
        f"{sorted(others)[:8]}; {what_to_do(where, named)}"
    )


def what_to_do(where: str, named: dict[str, str]) -> str:
    """The rest of the sentence on folders of which some are splits: paths below ``where`` by their split words."""
    training = sorted(name for name, word in named.items() if SPLIT_OF[word] == "train")
    if training:
        way = f"name the folder to be read, such as {f'{where}/{training[0]}'!r}, or move the others elsewhere"
    else:
        way = f"move the others into {f'{where}/train'!r}, if they are what is trained on"
    return f"{way}; {ALL_HELP}"


def _are_splits(named: dict[str, str], others: Sequence[str]) -> bool:
    """Whether some names beside others must be meant as splits."""
    if named.keys() == {"valid"} and "invalid" in map(str.lower, others):
        return False
    rest = {name: " ".join(word for word in words_of(name) if word not in KEYWORDS) for name in named}
    splits = {name: SPLIT_OF[word] for name, word in named.items()}
    like_other = {" ".join(words_of(name)) for name in others}
    if any(is_plain(name) or (splits[name] != "train" and rest[name] in like_other) for name in named):
        return True
    if len(set(splits.values())) < 2 or "train" not in splits.values() or may_be_classes(named):
        return False
    return len(named) >= len(others) or any(
        rest[one] == rest[other] and splits[one] != splits[other] for one in named for other in named
    )


def split_of_file(file: PurePath) -> str:
    """The split word of a file's name or else of the nearest of its folders; empty for none, or for two that differ."""
    words = [split_words(part) for part in (*file.parts[:-1], file.stem)]
    named = [each for each in reversed(words) if each]
    if not named or len(named[0]) > 1:
        return ""
    folders = [each for each in named if len(each) == 1]
    return named[0][0] if all(SPLIT_OF[each[0]] == SPLIT_OF[named[0][0]] for each in folders[:2]) else ""


def files_by_split(files: Sequence[File], below: Path, describe: str = "") -> dict[str, list[File]]:
    """Tables or tar files by their split words; empty if none of them names a split.

    Where all lie in folders that are splits, these tell; else each file's own name and folders.

    Args:
        files: Paths below ``below``.
        below: What of the paths is not looked at.
        describe: How the message names the place; the folder itself if it is not given.

    Raises:
        UserError: Some name a split and others do not, or two that differ.
    """
    where = describe or str(below)
    relative = {file: Path(file).relative_to(below) for file in files}
    if all(len(each.parts) > 1 for each in relative.values()):
        tops = splits_of_folders(sorted({each.parts[0] for each in relative.values()}), where)
        if tops:
            return _gather(files, lambda file: tops[relative[file].parts[0]])
    words = {file: split_of_file(each) for file, each in relative.items()}
    others = [file for file in files if not words[file]]
    if not any(words.values()) and not any(split_words(part) for file in others for part in relative[file].parts):
        return {}
    if others:
        named = sorted(set(filter(None, words.values())))
        which = f"of the splits {named} and others" if named else "named after several splits"
        raise UserError(
            f"[data] path: {where!r} has files {which}, such as {relative[others[0]].name!r}; put the files of each "
            f"split into a folder of its own (train, validation, test), or name files by path or data_files; {ALL_HELP}"
        )
    return _gather(files, lambda file: words[file])


def _gather(files: Sequence[File], word: Callable[[File], str]) -> dict[str, list[File]]:
    by_split: dict[str, list[File]] = {}
    for file in files:
        by_split.setdefault(word(file), []).append(file)
    return by_split


def no_such_split(what: str, kind: str, words: Iterable[str], asked: str) -> UserError:
    """The refusal of a split that is not there."""
    return UserError(f"[data] split: {what!r} has {kind} of {sorted(words)}, none of {asked!r}; {ALL_HELP}")


def refuse_several(files: Sequence[str], patterns: Sequence[str], split: str) -> None:
    """Refuse files that a pattern with a wildcard names, where they are of several splits.

    Raises:
        UserError: They are; or some name a split and others do not.
    """
    if split == ALL or not any(char in pattern for pattern in patterns for char in "*?[") or len(files) < 2:
        return
    folder = Path(os.path.commonpath([os.path.dirname(file) or "." for file in files]))
    by_split = files_by_split([Path(file) for file in files], folder, ", ".join(patterns))
    if len({SPLIT_OF[word] for word in by_split}) > 1:
        raise UserError(
            f"[data] path: {', '.join(patterns)!r} names files of several splits, {in_order(by_split)}; write a "
            f"pattern for one of them, or give their folder and [data] split; {ALL_HELP}"
        )
