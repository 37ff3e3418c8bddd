"""Samples in tar files: which of their files are images, and which hold the labels.

As in WebDataset, a sample consists of consecutive files whose names are equal up to the first dot.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa
from pyarrow import compute

from sslkit.data.formats.columns import Columns
from sslkit.data.formats.folder_listing import SUFFIXES, display_path, member_text, table_of_images, to_text
from sslkit.data.formats.hints import advice_for, count_suffixes, image_suffix
from sslkit.data.formats.image_folders import folders_of_split
from sslkit.data.formats.mask_files import describe_masks, find_masks, is_annotation
from sslkit.data.formats.splits import ALL
from sslkit.data.formats.tar_shards import MAX_NAME, Member, is_shard, open_shard, walk
from sslkit.errors import UserError

NO_IMAGES = (".cls", ".txt", ".json", ".npy", ".npz")  # suffixes of other files of a sample
COLUMNS = {"member": pa.string(), "label": pa.string(), "annotation": pa.bool_(), "folder": pa.int32()}  # of `_Index`
Row = tuple[str, str | None, bool, int]
PACKED_ROWS = 65_536


@dataclass(slots=True)
class _Image:
    """An image file of a sample."""

    suffixes: str  # text after the first dot of the name, such as ``crop.png``
    name: bytes  # in the tar file
    member: str  # its location, as `member_text` writes it
    annotation: bool  # the name is that of a mask or a depth map


@dataclass(slots=True)
class _Label:
    """A label of a sample: the name of its file, and the label or what is wrong with it."""

    name: bytes
    text: str = ""
    problem: str = ""


@dataclass
class _Index:
    """The images found so far, as Arrow tables of `COLUMNS`, and counts of the files that are read and skipped."""

    rows: list[Row] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    folders: dict[bytes, int] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    example: tuple[Path, Member] | None = None
    problem: str = ""

    def pack(self) -> None:
        """Move the rows into a table, which takes less memory."""
        self.tables.append(pa.Table.from_struct_array(pa.array(self.rows, pa.struct(COLUMNS))))
        self.rows = []


def index_shards(
    files: list[Path], image: str | None, label: str | None, split: str = ALL
) -> tuple[datasets.Dataset, Columns, str]:
    """Make a row for each image in tar files, in order. Returns rows, columns, and a summary to log.

    If a sample has several images, those with a single suffix (``x.jpg``) are read and others (``x.crop.png``) are not.
    Files that are named like masks, depth maps or the like (``x.mask.png``) are only read if there are no others.

    An invalid tar file, no images or none of the split, and a sample with images of several kinds raise `UserError`.

    Args:
        files: Uncompressed tar files.
        image: Suffix of the images, such as ``jpg`` or ``mask.png``; None (or ``image``) for any usual one.
        label: Suffix of the file that holds a sample's label, or a key of its ``.json``; None for ``cls`` if it exists.
        split: The split to read, if folders in the files are named after splits.
    """
    if label == "image":
        raise UserError("[data] label_column: 'image' is the column of images itself")
    wanted = (image or "").lstrip(".").lower()
    index = _index_all(files, wanted, label or "cls")
    if wanted == "image" and not index.read:
        index = _index_all(files, "", label or "cls")
    if not index.read:
        raise _without_images(files, index, image)
    if image is None:
        _refuse_tar_of_tars(files[0], index)
    table, note = _of_split(_without_annotations(index, wanted), index, files[0], split)
    if split != ALL:
        table, masks = _without_masks(table, index)
        note += masks
    columns, name = {}, None
    if table["label"].null_count < len(table):
        name = label or "cls"
        columns[name] = table["label"], datasets.Value("string")
    elif label is not None and not index.problem:
        raise UserError(f"[data] label_column: no image has a .{label} file, or a .json with a key {label!r}")
    rows = table_of_images(table["member"], columns)
    return rows, Columns("image", name, unlabelled=index.problem), _summary(index, name) + note


def _of_split(table: pa.Table, index: _Index, file: Path, split: str) -> tuple[pa.Table, str]:
    """The rows of a split, without folders of masks or of other splits, and a note on what is left out."""
    names = [to_text(os.fsdecode(folder)).rstrip("/") for folder in index.folders]
    if split == ALL or not any(names):
        return table, ""
    wanted, left_out = folders_of_split(names, split, display_path(file))
    if len(wanted) == len(names):
        return table, ""
    numbers = [number for number, name in enumerate(names) if name in wanted]
    chosen = table.filter(compute.is_in(table["folder"], pa.array(numbers, pa.int32())))
    return chosen, f", folders left out: {len(table) - len(chosen):,} images, in {left_out[:4]}"


def _without_masks(table: pa.Table, index: _Index) -> tuple[pa.Table, str]:
    """The rows without masks and the like that are samples of their own, and a note on them."""
    masks = find_masks(table["member"])
    if masks is None:
        return table, ""
    names = [os.path.basename(member) for member in table["member"].filter(pa.array(masks)).to_pylist()]
    index.read.subtract(name.partition(".")[2].lower() for name in names)
    index.read = +index.read
    return table.filter(pa.array(~masks)), f", {describe_masks(table['member'], masks)}"


def _index_all(files: list[Path], wanted: str, label: str) -> _Index:
    index = _Index()
    for file in files:
        _index_file(file, wanted, label, index)
        index.pack()
    return index


def _index_file(file: Path, wanted: str, label: str, index: _Index) -> None:
    """Add the images of one tar file."""
    shard, ending = to_text(str(file)), f".{wanted}"
    with open_shard(file) as stream:
        key, images, labels = b"", list[_Image](), list[_Label]()
        for member in walk(stream, file):
            base = member.name[member.name.rfind(b"/") + 1 :]
            stem, dot, after = base.partition(b".")
            sample = member.name[: len(member.name) - len(dot + after)]
            if sample != key:
                _add_sample(file, key, images, labels, index)
                key, images, labels = sample, [], []
            if not stem or (not dot and wanted):
                continue
            suffixes = after.decode("latin-1").lower()
            suffix = suffixes[suffixes.rfind(".") + 1 :] if dot else ""
            if f".{suffixes}".endswith(ending) if wanted else f".{suffix}" in SUFFIXES:
                text = member_text(shard, member.offset, member.size, to_text(os.fsdecode(member.name)))
                annotation = len(suffixes) > len(suffix) and is_annotation(suffixes)
                images.append(_Image(suffixes, member.name, text, annotation))
            elif (found := _read_label(stream, file, member, suffix, label)) is not None:
                labels.append(found)
            else:
                other = ".tar" if is_shard(base.decode("latin-1")) else f".{suffix}" if dot else "no suffix"
                index.others[other] += 1
                if index.example is None and other not in NO_IMAGES:
                    index.example = file, member
        _add_sample(file, key, images, labels, index)


def _add_sample(file: Path, key: bytes, images: list[_Image], labels: list[_Label], index: _Index) -> None:
    """Add the images of a sample."""
    if len(images) > 1:
        images = _preferred(file, key, images, index)
    for image in images:
        label = _label_of(file, key, image, labels, index) if labels else None
        folder = index.folders.setdefault(key[: key.rfind(b"/") + 1], len(index.folders))
        index.rows.append((image.member, label, image.annotation, folder))
        index.read[image.suffixes] += 1
    if len(index.rows) >= PACKED_ROWS:
        index.pack()


def _preferred(file: Path, key: bytes, images: list[_Image], index: _Index) -> list[_Image]:
    """Of several images of a sample, those that are read."""
    annotations = [each for each in images if each.annotation]
    others = [each for each in images if not each.annotation] or images
    plain = [each for each in others if "." not in each.suffixes]
    kinds = sorted({each.suffixes for each in plain})
    if len(kinds) > 1:
        raise UserError(
            f"[data] image_column: {display_path(key)!r} of {display_path(file)} has images of several kinds, "
            f'{", ".join(f".{kind}" for kind in kinds)}; name the one to read, such as image_column = "{kinds[0]}" '
            f"(--image-column {kinds[0]})"
        )
    chosen = plain or others
    index.skipped.update(_kind(each.suffixes) for each in images if each not in chosen and each not in annotations)
    # Annotations are left out at the end, if it turns out that there are images.
    return [*chosen, *(each for each in annotations if each not in chosen)]


def _kind(suffixes: str) -> str:
    """What follows the first dot of a name, for messages, with numbers (such as dates) replaced by ``#``."""
    return f".{re.sub('[0-9]+(?=.*[.])', '#', suffixes)}"


def _without_annotations(index: _Index, wanted: str) -> pa.Table:
    """The rows without annotations, if there are images and annotations were not asked for."""
    table = pa.concat_tables(index.tables)
    annotations = table["annotation"]
    if is_annotation(wanted) or not compute.any(annotations).as_py() or compute.all(annotations).as_py():
        return table
    for suffixes in [each for each in index.read if "." in each and is_annotation(each)]:
        index.skipped[_kind(suffixes)] += index.read.pop(suffixes)
    return table.filter(compute.invert(annotations))


def _label_of(file: Path, key: bytes, image: _Image, labels: list[_Label], index: _Index) -> str | None:
    """The label of an image: the one with the same name, or else the only one of its sample."""
    own = labels
    if len(labels) > 1:
        stem = os.path.splitext(image.name)[0]
        own = [each for each in labels if os.path.splitext(each.name)[0] == stem] or labels
    problem = own[0].problem
    if len(own) > 1:
        problem = (
            f"{display_path(file)} has {len(own)} labels for {display_path(key)!r}, {own[0].text!r:.40} and "
            f"{own[1].text!r:.40}; samples are told apart by their names up to the first dot: give each label the name "
            "of its image"
        )
    if problem:
        index.problem = index.problem or problem
        return None
    return own[0].text


def _read_label(stream: BinaryIO, file: Path, member: Member, suffix: str, label: str) -> _Label | None:
    """The label that a member holds, or None."""
    if suffix != label and (suffix != "json" or label in ("cls", "txt")):
        return None
    where = f"{display_path(member.name)} of {display_path(file)}"
    if not 0 <= member.size <= MAX_NAME:
        return _Label(member.name, problem=f"{where} is a label of {member.size} bytes, more than {MAX_NAME}")
    stream.seek(member.offset)
    text = stream.read(member.size).decode("utf-8", "replace").strip()
    if suffix == label:
        return _Label(member.name, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _Label(member.name, problem=f"{where} is not valid JSON")
    found = value.get(label) if isinstance(value, dict) else None
    if found is None:
        return None
    if isinstance(found, str | int):
        return _Label(member.name, str(found))
    problem = f"{where} has {found!r:.50} for {label!r}; evaluation needs one class, a word or a number"
    return _Label(member.name, problem=problem)


def _summary(index: _Index, label: str | None) -> str:
    kinds = Counter[str]()
    for suffixes, number in index.read.items():
        kinds[_kind(suffixes)] += number
    read = ", ".join(kind for kind, _ in kinds.most_common(4))
    left_out = +Counter({**index.skipped, ".tar": index.others[".tar"]})
    skipped = f" (left out: {count_suffixes(left_out)})" if left_out else ""
    return f"image files {read}{skipped}, " + (f"labels of .{label}" if label else "no labels")


def _refuse_tar_of_tars(file: Path, index: _Index) -> None:
    """Refuse tar files that contain as many tar files as images, or more: the images are probably in those."""
    inner, images = index.others[".tar"], index.read.total()
    if inner >= images:
        where, suffix = display_path(file), index.read.most_common(1)[0][0].rpartition(".")[2]
        raise UserError(
            f"[data] path: {where} holds {inner:,} tar files beside {images:,} images; {_unpack(where)}, move the "
            f'images out of there, then path = "shards"; to read only those images, give image_column = "{suffix}" '
            f"(--image-column {suffix})"
        )


def _unpack(where: str) -> str:
    return f"it is a tar file of tar files: unpack it once, by mkdir shards && tar -xf {where} -C shards"


def _without_images(files: list[Path], index: _Index, image: str | None) -> UserError:
    """What tar files hold in place of images, and what to do."""
    where, suffixes = display_path(files[0]), count_suffixes(index.others)
    if image is not None and image != "image":
        return UserError(
            f"[data] image_column: no file in {where} ends in .{image.lstrip('.')}; there are {suffixes or 'no files'}"
        )
    found, suffix = "", ""
    if index.example:
        file, member = index.example
        suffix = display_path(os.path.splitext(member.name)[1]).lstrip(".")
        with open_shard(file) as stream:
            stream.seek(member.offset)
            found = image_suffix(stream.read(min(16, max(member.size, 0))))
    pack = f"pack them again with names that end in {found}"
    if index.others[".tar"]:
        advice = f'{_unpack(where)}, then path = "shards"'
    elif found and suffix:
        advice = f'.{suffix} looks like {found}: give image_column = "{suffix}" (--image-column {suffix}), or {pack}'
    elif found:
        advice = f"they look like {found}: {pack}"
    else:
        advice = advice_for(index.others) or "pack images with names that end in .jpg, .png or the like"
    found_files = suffixes or "it is empty"
    return UserError(f"[data] path: {where} holds no images, judging by file names: {found_files}; {advice}")
