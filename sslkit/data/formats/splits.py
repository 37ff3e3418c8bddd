"""Recognise splits in the names of folders and files, for all kinds of data: ``val2017``, ``Training Images``.

A *split name* is the word that is found in a file or folder name, such as ``val``; `SPLIT_OF` maps it to its split,
such as ``validation``. The synonyms are those of the Hub, and held-out sets.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from sslkit.errors import UserError

ALL = "all"  # the split that contains everything, whatever its name
SYNONYMS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
    "holdout": ("holdout",),
}
SPLIT_OF = {word: split for split, words in SYNONYMS.items() for word in words}
ENDINGS = ("", "set", "sets", "data", "images", "imgs", "split")  # trainset, testdata
KEYWORDS = {word + ending: word for word in SPLIT_OF for ending in ENDINGS}
# Words that tell nothing about a split: "train_images" is as plain as "train".
NEUTRAL = frozenset(
    re.findall(
        "[a-z]+",
        "set sets data dataset images image imgs img photos pictures pics files samples split splits jpg "
        "jpeg png jpegimages original final full clean raw the a b x y v",
    )
)
# Words that name a part of a split, beside its name: train_labeled, test_noisy. With any other word the name may be
# that of a class: train_station, test_kitchen.
PARTS = NEUTRAL | frozenset(
    re.findall(
        "[a-z]+",
        "labeled labelled unlabeled unlabelled annotated extra small large mini tiny big subset part fold "
        "noisy real synthetic synth fake new old all hr lr crops cropped patches frames resized seen "
        "unseen easy hard public private",
    )
)
HELD_OUT = re.compile(r"h[eo]ld[\W_]?outs?", re.IGNORECASE)
HAS_SPLIT = re.compile("train|trn|test|tst|eval|val|dev|h[eo]ld", re.IGNORECASE)  # matches every name of a split
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
ALL_HELP = (
    'if none of these names means a split, give split = "all" (--set data.split=all, --train-split all, --split all or '
    "[monitor] train_split)"
)


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: runs of letters; ``trainA`` is two words and ``held-out`` is one."""
    name = CAMEL.sub(" ", HELD_OUT.sub("_holdout_", name))
    return [word.lower() for word in re.findall(r"[^\W\d_]+", name)]


def split_names(name: str) -> list[str]:
    """The split names in a name, one for each split: ``test_eval`` has one."""
    if not HAS_SPLIT.search(name):  # as nearly all of maybe a million names
        return []
    found = {SPLIT_OF[KEYWORDS[word]]: KEYWORDS[word] for word in reversed(words_of(name)) if word in KEYWORDS}
    return list(found.values())


def is_plain(name: str) -> bool:
    """Whether every word of a name is a split name or neutral: ``val2017``, ``Test Images``, but not ``test_tube``."""
    return all(word in KEYWORDS or word in NEUTRAL for word in words_of(name))


def may_be_classes(names: Iterable[str]) -> bool:
    """Whether names with a split name may all be classes, like ``train_station`` and ``test_kitchen``.

    In each of them the split name comes first and words follow that are not in `PARTS`, different ones for each split;
    ``train_cats`` and ``test_cats`` are splits.
    """
    splits: dict[str, str] = {}
    for name in names:
        first, *rest = words_of(name)
        if len(split_names(name)) != 1 or first not in KEYWORDS or not rest or not PARTS.isdisjoint(rest):
            return False
        split = SPLIT_OF[KEYWORDS[first]]
        if splits.setdefault(" ".join(rest), split) != split:
            return False
    return True


def choose(available: Iterable[str], asked: str) -> list[str]:
    """Those of the available split names that a requested split stands for.

    ``train``, ``test`` and ``validation`` stand for all their synonyms. Any other name stands for itself or, if it is
    not available, for its synonyms.
    """
    names, asked = list(available), asked.lower()
    same = [name for name in names if name.lower() == asked]
    if same and SPLIT_OF.get(asked) != asked:
        return same
    split = SPLIT_OF.get(KEYWORDS.get(asked, asked))
    return [name for name in names if name in same or (split and SPLIT_OF.get(name.lower()) == split)]


def in_order(names: Iterable[str]) -> list[str]:
    """Split names in the order of `SYNONYMS`, then unknown ones."""
    order = list(SYNONYMS)
    return sorted(set(names), key=lambda name: (order.index(SPLIT_OF[name]) if name in SPLIT_OF else len(order), name))


def splits_of_folders(names: Sequence[str], where: str) -> dict[str, str]:
    """The split name of each of the subfolders of one folder; empty if they are classes or the like.

    They are splits if each has a split name. If only some have one, they are classes (``test_tube`` beside ``flask``)
    unless they are plain (see `is_plain`) or equal except for the split name (``photos_train`` and ``photos_test``);
    these raise `UserError` beside others. ``where`` is the folder, as messages name it.
    """
    found = {name: split_names(name) for name in names}
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
    """Advice about folders of which only some are splits; ``named`` are their paths below ``where`` and split names."""
    training = sorted(name for name, word in named.items() if SPLIT_OF[word] == "train")
    if training:
        advice = f"name the folder to read, such as {f'{where}/{training[0]}'!r}, or move the others elsewhere"
    else:
        advice = f"move the others into {f'{where}/train'!r} if they are the training images"
    return f"{advice}; {ALL_HELP}"


def _are_splits(named: dict[str, str], others: Sequence[str]) -> bool:
    """Whether folders with split names must be splits although there are others beside them."""
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
    """The split name in a file's name or else in its nearest folder; empty if there is none, or two that differ."""
    names = [split_names(part) for part in (*file.parts[:-1], file.stem)]
    named = [each for each in reversed(names) if each]
    if not named or len(named[0]) > 1:
        return ""
    folders = [each for each in named if len(each) == 1]
    return named[0][0] if all(SPLIT_OF[each[0]] == SPLIT_OF[named[0][0]] for each in folders[:2]) else ""


def files_by_split(files: Sequence[Path], below: Path, describe: str = "") -> dict[str, list[Path]]:
    """Tables or tar files by their split names; empty if no file has one.

    If all files lie in folders that are splits, these folders decide; else each file's own name and its folders below
    ``below``. Some with a split name beside others with none, or with two that differ, raise `UserError`. ``describe``
    is how messages name the folder ``below``; the default is its path.
    """
    where = describe or str(below)
    relative = {file: file.relative_to(below) for file in files}
    tops: dict[str, str] = {}
    if all(len(each.parts) > 1 for each in relative.values()):
        tops = splits_of_folders(sorted({each.parts[0] for each in relative.values()}), where)
    names = {file: tops[each.parts[0]] if tops else split_of_file(each) for file, each in relative.items()}
    others = [file for file in files if not names[file]]
    if not any(names.values()) and not any(split_names(part) for file in others for part in relative[file].parts):
        return {}
    if others:
        named = sorted(set(filter(None, names.values())))
        which = f"of the splits {named} and others" if named else "named after several splits"
        raise UserError(
            f"[data] path: {where!r} has files {which}, such as {relative[others[0]].name!r}; put the files of each "
            f"split into a folder of its own (train, validation, test), or name files by path or data_files; {ALL_HELP}"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(names[file], []).append(file)
    return by_split


def no_such_split(what: str, kind: str, names: Iterable[str], asked: str) -> UserError:
    """The error about a split that does not exist."""
    return UserError(f"[data] split: {what!r} has {kind} of {sorted(names)}, none of {asked!r}; {ALL_HELP}")


def refuse_several(files: Sequence[str], patterns: Sequence[str], split: str) -> None:
    """Refuse files of several splits, or of splits and others, that a pattern with a wildcard matches."""
    if split == ALL or not any(char in pattern for pattern in patterns for char in "*?[") or len(files) < 2:
        return
    folder = Path(os.path.commonpath([os.path.dirname(file) or "." for file in files]))
    by_split = files_by_split([Path(file) for file in files], folder, ", ".join(patterns))
    if len({SPLIT_OF[word] for word in by_split}) > 1:
        raise UserError(
            f"[data] path: {', '.join(patterns)!r} matches files of several splits, {in_order(by_split)}; write a "
            f"pattern for one of them, or give their folder and [data] split; {ALL_HELP}"
        )
