"""Samples in tar files: which of the files of one name are images, and which hold its label.

A sample is a run of files whose names are equal up to the first dot, as WebDataset has it.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
from pyarrow import compute

from sslkit.data.formats.columns import is_annotation
from sslkit.data.formats.companions import companions, left_out
from sslkit.data.formats.folder_listing import SUFFIXES, place_in, printable, to_text
from sslkit.data.formats.hints import advice_for, count_suffixes, image_suffix
from sslkit.data.formats.image_folders import folders_of_split
from sslkit.data.formats.splits import ALL
from sslkit.data.formats.tar_shards import MAX_NAME, Member, is_shard, open_shard, walk
from sslkit.errors import UserError

NO_IMAGES = (".cls", ".txt", ".json", ".npy", ".npz")  # what lies beside images


@dataclass(frozen=True)
class Indexed:
    """The images of tar files.

    Attributes:
        table: A row for each: ``image``, and a column of labels if there are any.
        label: The name of that column, or None.
        words: Which files of the samples are read, for print.
        unlabelled: What is wrong with the labels; empty if nothing is.
    """

    table: datasets.Dataset
    label: str | None
    words: str
    unlabelled: str


@dataclass(slots=True)
class _Image:
    """An image of a sample: what its name has after the first dot, its name, and its place."""

    suffixes: str
    name: bytes
    place: str
    annotation: bool


@dataclass(slots=True)
class _Label:
    """A label of a sample: its file's name, and the word, or what is wrong with it."""

    name: bytes
    word: str
    problem: str = ""


@dataclass
class _Tally:
    """Rows as they are found, those of each tar file packed together, and what is left out."""

    places: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    annotations: list[bool] = field(default_factory=list)
    folders: list[int] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)
    packed: list[pa.Table] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    example: tuple[Path, Member] | None = None
    problem: str = ""

    def add(self, place: str, label: str | None, folder: bytes, *, annotation: bool) -> None:
        self.places.append(place)
        self.folders.append(self.numbers.setdefault(folder, len(self.numbers)))
        self.labels.append(label)
        self.annotations.append(annotation)

    def pack(self) -> None:
        columns = [
            pa.array(self.places, pa.string()),
            pa.array(self.labels, pa.string()),
            pa.array(self.annotations, pa.bool_()),
            pa.array(self.folders, pa.int32()),
        ]
        self.packed.append(pa.table(columns, ["place", "label", "annotation", "folder"]))
        self.places, self.labels, self.annotations, self.folders = [], [], [], []


def index_shards(files: list[Path], image: str | None, label: str | None, split: str = ALL) -> Indexed:
    """A row for each image of tar files, in their order.

    Of several images of a sample, those called by the sample's name and a suffix alone (``x.jpg``) are read and others
    (``x.crop.png``) are not; files named as masks, depths or the like (``x.mask.png``) are read nowhere unless there
    are no others.

    Args:
        files: Plain tar files.
        image: Suffix of the images, such as ``jpg`` or ``mask.png``; None (or ``image``): any usual one.
        label: Suffix of the file that holds a sample's label, or a key of its ``.json``; None for ``cls`` where there
            is one.
        split: Which images are read where folders in the files are named after splits.

    Raises:
        UserError: A file is not to be read as a plain tar file, holds no images, or none of the split, or a sample's
            are of several kinds.
    """
    if label == "image":
        raise UserError("[data] label_column: 'image' is the column of images itself")
    wanted = (image or "").lstrip(".").lower()
    tally = _index_all(files, wanted, label or "cls")
    if wanted == "image" and not tally.read:
        tally = _index_all(files, "", label or "cls")
    if not tally.read:
        raise _without_images(files, tally, image)
    if image is None:
        _refuse_tar_of_tars(files[0], tally)
    rows, note = _of_split(_without_annotations(tally, wanted), tally, files[0], split)
    if split != ALL:
        rows, beside = _without_companions(rows, tally)
        note += beside
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    cells = [
        pa.StructArray.from_arrays([pa.nulls(len(each), pa.binary()), each], ["bytes", "path"])
        for each in rows["place"].chunks
    ]
    columns = {"image": pa.chunked_array(cells, features["image"].pa_type)}
    name = None
    if rows["label"].null_count < len(rows):
        name = label or "cls"
        columns[name], features[name] = rows["label"], datasets.Value("string")
    elif label is not None and not tally.problem:
        raise UserError(f"[data] label_column: beside no image lies a .{label}, or a .json with a key {label!r}")
    table = pa.table(columns).combine_chunks()
    found = datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features)))
    return Indexed(found, name, _words(tally, name) + note, tally.problem)


def _of_split(rows: pa.Table, tally: _Tally, file: Path, split: str) -> tuple[pa.Table, str]:
    """The rows of a split where folders in the tar files are named after several, without folders of masks.

    Returns:
        The rows, and words on what is left out.
    """
    names = [to_text(os.fsdecode(folder)).rstrip("/") for folder in tally.numbers]
    if split == ALL or not any(names):
        return rows, ""
    where = printable(to_text(str(file)))
    wanted, left_out = folders_of_split(names, split, where)
    if len(wanted) == len(names):
        return rows, ""
    numbers = [number for number, name in enumerate(names) if name in wanted]
    chosen = rows.filter(compute.is_in(rows["folder"], pa.array(numbers, pa.int32())))
    return chosen, f", folders left out: {len(rows) - len(chosen):,} images, in {left_out[:4]}"


def _without_companions(rows: pa.Table, tally: _Tally) -> tuple[pa.Table, str]:
    """The rows without masks and the like that are samples of their own, and words on what is left out."""
    marks = companions(rows["place"])
    if marks is None:
        return rows, ""
    names = [os.path.basename(place) for place in rows["place"].filter(pa.array(marks)).to_pylist()]
    tally.read.subtract(name.partition(".")[2].lower() for name in names)
    tally.read = +tally.read
    return rows.filter(pa.array(~marks)), f", {left_out(rows['place'], marks)}"


def _index_all(files: list[Path], wanted: str, label: str) -> _Tally:
    tally = _Tally()
    for file in files:
        _index(file, wanted, label, tally)
        tally.pack()
    return tally


def _index(file: Path, wanted: str, label: str, tally: _Tally) -> None:
    """Add the images of one tar file."""
    shard, ending = to_text(str(file)), f".{wanted}"
    with open_shard(file) as stream:
        key, images, labels = b"", list[_Image](), list[_Label]()
        for member in walk(stream, file):
            base = member.name[member.name.rfind(b"/") + 1 :]
            stem, dot, after = base.partition(b".")
            sample = member.name[: len(member.name) - len(dot + after)]
            if sample != key:
                _close(file, key, images, labels, tally)
                key, images, labels = sample, [], []
            if not stem or (not dot and wanted):
                continue
            suffixes = after.decode("latin-1").lower()
            suffix = suffixes[suffixes.rfind(".") + 1 :] if dot else ""
            if f".{suffixes}".endswith(ending) if wanted else f".{suffix}" in SUFFIXES:
                place = place_in(shard, member.offset, member.size, to_text(os.fsdecode(member.name)))
                drawn = len(suffixes) > len(suffix) and is_annotation(suffixes)
                images.append(_Image(suffixes, member.name, place, drawn))
            elif (found := _label(stream, file, member, suffix, label)) is not None:
                labels.append(found)
            else:
                inner = is_shard(base.decode("latin-1"))
                _count_other(tally, file, member, ".tar" if inner else f".{suffix}" if dot else "no suffix")
        _close(file, key, images, labels, tally)


def _count_other(tally: _Tally, file: Path, member: Member, suffix: str) -> None:
    tally.others[suffix] += 1
    if tally.example is None and suffix not in NO_IMAGES:
        tally.example = file, member


def _close(file: Path, key: bytes, images: list[_Image], labels: list[_Label], tally: _Tally) -> None:
    """Add the images of a sample that is complete."""
    if not images:
        return
    if len(images) > 1:
        images = _preferred(file, key, images, tally)
    for image in images:
        label = _label_of(file, key, image, labels, tally) if labels else None
        tally.add(image.place, label, key[: key.rfind(b"/") + 1], annotation=image.annotation)
        tally.read[image.suffixes] += 1


def _preferred(file: Path, key: bytes, images: list[_Image], tally: _Tally) -> list[_Image]:
    """Of several images of a sample, those that are read."""
    drawn = [each for each in images if each.annotation]
    others = [each for each in images if not each.annotation] or images
    plain = [each for each in others if "." not in each.suffixes]
    kinds = sorted({each.suffixes for each in plain})
    if len(kinds) > 1:
        raise UserError(
            f"[data] image_column: {_shown(key)} of {printable(to_text(str(file)))} has images of several kinds, "
            f'{", ".join(f".{kind}" for kind in kinds)}; say which to read, such as image_column = "{kinds[0]}" '
            f"(--image-column {kinds[0]})"
        )
    chosen = plain or others
    tally.left_out.update(_kind(each.suffixes) for each in images if each not in chosen and each not in drawn)
    # What is drawn over images is left out at the end, once it is known that there are images.
    return [*chosen, *(each for each in drawn if each not in chosen)]


def _kind(suffixes: str) -> str:
    """What a name has after its first dot, for print: a number of several digits, as in a date, is one sign."""
    return f".{re.sub('[0-9]+(?=.*[.])', '#', suffixes)}"


def _without_annotations(tally: _Tally, wanted: str) -> pa.Table:
    """The rows without what is drawn over images, if there are images and it was not asked for."""
    rows = pa.concat_tables(tally.packed)
    drawn = rows["annotation"]
    if is_annotation(wanted) or not compute.any(drawn).as_py() or compute.all(drawn).as_py():
        return rows
    for suffixes in [each for each in tally.read if "." in each and is_annotation(each)]:
        tally.left_out[_kind(suffixes)] += tally.read.pop(suffixes)
    return rows.filter(compute.invert(drawn))


def _label_of(file: Path, key: bytes, image: _Image, labels: list[_Label], tally: _Tally) -> str | None:
    """The label of an image: the one called like it, or else the only one of its sample."""
    own = labels
    if len(labels) > 1:
        own = [each for each in labels if _stem(each.name) == _stem(image.name)] or labels
    problem = own[0].problem
    if len(own) > 1:
        problem = (
            f"{printable(to_text(str(file)))} has {len(own)} labels for {_shown(key)}, {own[0].word!r:.40} and "
            f"{own[1].word!r:.40}; names are cut at the first dot: give each image a label called like it"
        )
    if problem:
        tally.problem = tally.problem or problem
        return None
    return own[0].word


def _stem(name: bytes) -> bytes:
    return name[: name.rfind(b".")]


def _shown(key: bytes) -> str:
    return repr(printable(to_text(os.fsdecode(key))))


def _label(stream: BinaryIO, file: Path, member: Member, suffix: str, label: str) -> _Label | None:
    """The label that a member holds, if it holds one."""
    if suffix not in (label, "json") or (suffix == "json" and label in ("cls", "txt")):
        return None
    if not 0 <= member.size <= MAX_NAME:
        return _Label(
            member.name, "", f"{_named(member, file)} is a label of {member.size} bytes, where {MAX_NAME} would do"
        )
    stream.seek(member.offset)
    text = stream.read(member.size).decode("utf-8", "replace").strip()
    if suffix == label:
        return _Label(member.name, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _Label(member.name, "", f"{_named(member, file)} is a .json that is none")
    found = value.get(label) if isinstance(value, dict) else None
    if found is None or isinstance(found, str | int):
        return None if found is None else _Label(member.name, str(found))
    problem = f"{_named(member, file)} has {found!r:.50} for {label!r}; evaluation needs one class, a word or a number"
    return _Label(member.name, "", problem)


def _named(member: Member, file: Path) -> str:
    return f"{printable(to_text(os.fsdecode(member.name)))} of {printable(to_text(str(file)))}"


def _words(tally: _Tally, label: str | None) -> str:
    kinds = Counter[str]()
    for suffixes, number in tally.read.items():
        kinds[_kind(suffixes)] += number
    read = ", ".join(kind for kind, _ in kinds.most_common(4))
    tally.left_out.update({".tar": tally.others[".tar"]} if tally.others[".tar"] else {})
    left = f" (left out: {count_suffixes(tally.left_out)})" if tally.left_out else ""
    return f"image files {read}{left}, " + (f"labels of .{label}" if label else "no labels")


def _refuse_tar_of_tars(file: Path, tally: _Tally) -> None:
    """Refuse tar files that hold as many tar files as images, or more: what is meant to be read is in those."""
    inner, images = tally.others[".tar"], tally.read.total()
    if inner >= images:
        where, suffix = printable(to_text(str(file))), tally.read.most_common(1)[0][0].rpartition(".")[2]
        raise UserError(
            f"[data] path: {where} holds {inner:,} tar files beside {images:,} images; it is a tar file of tar files: "
            f"unpack it once, by mkdir shards && tar -xf {where} -C shards, move the images out of there, then path = "
            f'"shards"; to read only those images, give image_column = "{suffix}" (--image-column {suffix})'
        )


def _without_images(files: list[Path], tally: _Tally, image: str | None) -> UserError:
    """What the tar files hold in place of images, and what to do."""
    where = printable(to_text(str(files[0])))
    there = f"{where} holds no images by their names: {count_suffixes(tally.others) or 'it is empty'}"
    if image is not None and image != "image":
        return UserError(f"[data] image_column: no file in {where} ends in .{image.lstrip('.')}; there are "
                         f"{count_suffixes(tally.others) or 'no files'}")  # fmt: skip
    if tally.others[".tar"]:
        return UserError(
            f"[data] path: {there}; it is a tar file of tar files: unpack it once, by mkdir "
            f'shards && tar -xf {where} -C shards, then path = "shards"'
        )
    found, suffix = "", ""
    if tally.example:
        file, member = tally.example
        suffix = printable(to_text(os.fsdecode(os.path.splitext(member.name)[1]))).lstrip(".")
        with open_shard(file) as stream:
            stream.seek(member.offset)
            found = image_suffix(stream.read(min(16, max(member.size, 0))))
    if found and suffix:
        return UserError(
            f'[data] path: {there}; .{suffix} looks like {found}: give image_column = "{suffix}" '
            f"(--image-column {suffix}), or pack them again with names that end in {found}"
        )
    if found:
        return UserError(
            f"[data] path: {there}; they look like {found}: pack them again with names that end in {found}"
        )
    advice = advice_for(tally.others) or "pack images with names that end in .jpg, .png or the like"
    return UserError(f"[data] path: {there}; {advice}")
