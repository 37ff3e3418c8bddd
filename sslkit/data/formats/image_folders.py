"""Image files below a folder, and which of them are of a split: told by the names of folders, at any depth.

So ``train/cat/1.jpg``, ``images/val/1.jpg`` (YOLO), ``test/images/1.jpg`` (Roboflow) and ``cat/train/1.jpg``.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import pyarrow as pa

from sslkit.data.formats.companions import companions, left_out
from sslkit.data.formats.folder_listing import (
    ImageFolder,
    Listing,
    count_images,
    folders_in,
    folders_with_images,
    list_images,
    printable,
    table_of_folders,
    to_text,
)
from sslkit.data.formats.hints import no_images
from sslkit.data.formats.splits import (
    ALL,
    ALL_HELP,
    KEYWORDS,
    SPLIT_OF,
    choose,
    in_order,
    is_drawn,
    is_plain,
    may_be_classes,
    no_such_split,
    split_words,
    splits_of_folders,
    what_to_do,
    words_of,
)
from sslkit.errors import UserError

Parts = tuple[str, ...]
BESIDE = "images beside the folders of the splits, left out: {:,}"
MAX_LINKS = 40  # one after the other, as the system itself has it
NO_CLASSES = frozenset(("images", "image", "imgs", "img", "photos", "pictures", "jpegimages", *KEYWORDS))


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split.

    Attributes:
        root: The folder below which all of them lie.
        sections: The folders of the split; only ``root`` where no folder is named after a split.
        folders: Those with images, in order.
        classes: What each of them is called as a class, or None where there is no folder per class.
        left_out: How many files were not taken for images, by suffix.
        notes: Sentences on what else is not taken.
    """

    root: Path
    sections: list[Path]
    folders: list[ImageFolder]
    classes: list[str] | None
    left_out: Counter[str]
    notes: list[str] = field(default_factory=list)

    def table(self) -> datasets.Dataset:
        """A row for each image."""
        return table_of_folders(self.folders, self.classes)


def find_images(folder: Path, split: str) -> ImageFiles:
    """The image files of a split below a folder.

    Raises:
        UserError: There are none, some folders name a split and others do not, or a link leads into another split.
    """
    if split != ALL and (tops := _split_at_top(folder)):
        return _of_tops(folder, tops, split)
    listing = list_images(folder)
    if not listing.folders:
        raise _without_images(folder, [listing])
    notes: list[str] = []
    if split != ALL:
        listing, notes = _without_annotations(folder, listing)
    placed = {} if split == ALL else _sections_of(folder, [each.path for each in listing.folders])
    if not placed:
        if split != ALL and not choose(["train"], split):
            raise UserError(
                f"[data] split: {str(folder)!r} has no folder {split!r}; it has {folders_in(folder)[:8]}, none of them "
                "named like a split; leave split out to read all images"
            )
        return replace(_whole(folder, listing, split), notes=notes)
    words = choose(in_order({word for word, _ in placed.values()}), split)
    if not words:
        raise no_such_split(str(folder), "folders", {word for word, _ in placed.values()}, split)
    chosen = [each for each in listing.folders if each.path in placed and placed[each.path][0] in words]
    sections = sorted({placed[each.path][1] for each in chosen})
    others = sorted({section for word, section in placed.values() if word not in words})
    images = replace(_of_sections(folder, sections, others, split, [replace(listing, folders=chosen)]), notes=notes)
    if beside := sum(len(each.images) for each in listing.folders if each.path not in placed):
        images.notes.append(BESIDE.format(beside))
    return images


def _of_tops(folder: Path, tops: dict[str, str], split: str) -> ImageFiles:
    """The images of a split where all folders right below are splits; the other ones are not looked into."""
    words = choose(in_order(tops.values()), split)
    if not words:
        raise UserError(f"[data] split: {str(folder)!r} has no folder {split!r}; it has {sorted(tops)[:8]}; {ALL_HELP}")
    sections = [folder / name for name, word in tops.items() if word in words]
    others = [folder / name for name, word in tops.items() if word not in words]
    pairs = [_without_annotations(section, list_images(section)) for section in sections]
    images = _of_sections(folder, sections, others, split, [listing for listing, _ in pairs])
    notes = [note for _, notes in pairs for note in notes]
    if beside := count_images(folder):
        notes.append(BESIDE.format(beside))
    return replace(images, notes=notes)


def image_splits(folder: Path) -> list[str]:
    """The split words that folders of images are named after; empty if none is.

    Raises:
        UserError: Some folders name a split and others do not.
    """
    if tops := _split_at_top(folder):
        return in_order(tops.values())
    paths = folders_with_images(folder)
    drawn = _drawn_over(folder, paths)
    return in_order({word for word, _ in _sections_of(folder, [each for each in paths if each not in drawn]).values()})


def refuse_several_folders(files: Sequence[str], split: str) -> None:
    """Refuse image files that patterns name, where their folders are of several splits.

    Raises:
        UserError: They are.
    """
    folders = sorted({os.path.dirname(file) or "." for file in files if not os.path.isdir(file)})
    if split == ALL or not folders:
        return
    common, placed = os.path.commonpath(folders), dict[Parts, tuple[str, int]]()
    _place([Path(folder).relative_to(common).parts for folder in folders], 0, common, placed)
    words = in_order({word for word, _ in placed.values()})
    if len({SPLIT_OF[word] for word in words}) > 1:
        raise UserError(
            f"[data] data_files: they are of several splits, {words}; name the files of one, or give the folder by "
            f"data_dir and [data] split; {ALL_HELP}"
        )


def folders_of_split(names: Sequence[str], split: str, where: str) -> tuple[set[str], list[str]]:
    """Folders in tar files: those of a split, and those left out, which are of others or hold masks and the like.

    Where they are all of one split, none is left out for it.

    Args:
        names: Their paths in the tar files; empty for what lies in no folder.
        split: Which is asked for.
        where: How messages name the tar files.

    Raises:
        UserError: Some are of a split and others are not, or none is of this one.
    """
    root = Path("/")
    paths = {f"/{name}": name for name in names}
    drawn = _drawn_over(root, list(paths))
    placed: dict[Parts, tuple[str, int]] = {}
    parts = {path: each for path, each in _parts_below(root, list(paths)).items() if path not in drawn}
    _place(list(parts.values()), 0, where, placed)
    words = {word for word, _ in placed.values()}
    wanted = {paths[path] for path in parts}
    if len({SPLIT_OF[word] for word in words}) > 1:
        doubtful = [paths[path] for path, part in parts.items() if part not in placed]
        if doubtful and may_be_classes({part[depth] for part, (_, depth) in placed.items()}):
            return wanted, sorted(set(names) - wanted)
        if doubtful:
            raise UserError(
                f"[data] path: {where!r} has folders of splits and others in it: splits {sorted(words)}, others "
                f"{sorted(doubtful)[:8]}; unpack it, and give the folder of the split as path; {ALL_HELP}"
            )
        chosen = choose(in_order(words), split)
        if not chosen:
            raise no_such_split(where, "folders in it", words, split)
        wanted = {paths[path] for path, part in parts.items() if placed[part][0] in chosen}
    return wanted, sorted(set(names) - wanted)


def _split_at_top(folder: Path) -> dict[str, str]:
    """Split words of the folders right below, where each of them has one; so no other folder needs to be walked."""
    names = folders_in(folder)
    if not names or not all(len(split_words(name)) == 1 and not is_drawn(name) for name in names):
        return {}
    return splits_of_folders(names, str(folder))


def _without_drawn(root: Path, listing: Listing) -> tuple[Listing, list[str]]:
    """A listing without folders of masks and the like beside those of images, and a sentence about these."""
    drawn = _drawn_over(root, [each.path for each in listing.folders])
    if not drawn:
        return listing, []
    left = sum(len(each.images) for each in listing.folders if each.path in drawn)
    names = sorted(os.path.relpath(path, root) for path in drawn)
    note = f"masks and the like beside images, left out: {left:,}, in {names[:4]}; name such a folder itself to read it"
    return replace(listing, folders=[each for each in listing.folders if each.path not in drawn]), [note]


def _without_annotations(root: Path, listing: Listing) -> tuple[Listing, list[str]]:
    """A listing without masks and the like, be they in folders of their own or beside images, and notes on them."""
    listing, notes = _without_drawn(root, listing)
    if not listing.folders:
        return listing, notes
    paths = pa.chunked_array([each.images for each in listing.folders])
    marks = companions(paths)
    if marks is None:
        return listing, notes
    folders, first = [], 0
    for each in listing.folders:
        kept = ~marks[first : first + len(each.images)]
        first += len(each.images)
        folders.append(each if kept.all() else replace(each, images=each.images.filter(pa.array(kept))))
    return replace(listing, folders=folders), [*notes, left_out(paths, marks)]


def _drawn_over(root: Path, paths: Sequence[str]) -> set[str]:
    """Those of the folders that hold masks and the like: they are called so beside ``images`` or folders of splits."""
    if not any(is_drawn(path) for path in paths):
        return set()
    drawn: set[str] = set()
    parts = _parts_below(root, paths)
    siblings: dict[Parts, set[str]] = {}
    for part in parts.values():
        for depth, name in enumerate(part):
            siblings.setdefault(part[:depth], set()).add(name)
    for path, part in parts.items():
        for depth, name in enumerate(part):
            others = [other for other in siblings[part[:depth]] if not is_drawn(other)]
            if is_drawn(name) and any(is_plain(other) and words_of(other) for other in others):
                drawn.add(path)
    return drawn


def _parts_below(root: Path, paths: Sequence[str]) -> dict[str, Parts]:
    """Paths below a folder, as the names of folders that lead there."""
    skipped = len(str(root).rstrip("/")) + 1
    return {path: tuple(path[skipped:].split("/")) if len(path) > skipped else () for path in paths}


def _sections_of(root: Path, paths: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """For each folder with images its split word and the folder of that split; not for those around such folders.

    Raises:
        UserError: Some are of a split and others are not.
    """
    placed: dict[Parts, tuple[str, int]] = {}
    parts = _parts_below(root, paths)
    _place(list(parts.values()), 0, str(root), placed)
    if not placed:
        return {}
    above = {path[:depth] for path, (_, depth) in placed.items()}
    doubtful = [path for path in paths if parts[path] not in placed and parts[path] not in above]
    if doubtful and may_be_classes({path[depth] for path, (_, depth) in placed.items()}):
        return {}
    if doubtful:
        named = {"/".join(path[: depth + 1]): word for path, (word, depth) in placed.items()}
        raise UserError(
            f"[data] path: {str(root)!r} has folders of splits and others: splits {sorted(named)[:8]}, others "
            f"{['/'.join(parts[path]) for path in doubtful[:8]]}; {what_to_do(str(root), named)}"
        )
    return {
        path: (placed[part][0], root.joinpath(*part[: placed[part][1] + 1]))
        for path, part in parts.items()
        if part in placed
    }


def _place(paths: list[Parts], depth: int, where: str, placed: dict[Parts, tuple[str, int]]) -> None:
    """Give each path the split word of the first of its folders that is one, and at which depth that is."""
    children: dict[str, list[Parts]] = {}
    for path in paths:
        if len(path) > depth:
            children.setdefault(path[depth], []).append(path)
    words = splits_of_folders(sorted(children), where)
    for name, inside in children.items():
        if name in words:
            placed.update(dict.fromkeys(inside, (words[name], depth)))
        else:
            _place(inside, depth + 1, f"{where}/{name}", placed)


def _whole(folder: Path, listing: Listing, split: str) -> ImageFiles:
    """All images below a folder, with its folders as classes."""
    if split != ALL:
        _refuse_links(listing.folders, _splits_beside(folder))
    return ImageFiles(folder, [folder], listing.folders, _worth_having(listing.classes), listing.left_out)


def _of_sections(
    folder: Path, sections: list[Path], others: list[Path], split: str, listings: list[Listing]
) -> ImageFiles:
    """The images of the folders of a split; a class's name is its folder's, be it in the split's or around it."""
    chosen = [each for listing in listings for each in listing.folders]
    if not chosen:
        raise _without_images(sections[0], listings)
    left_out = sum((listing.left_out for listing in listings), Counter[str]())
    if choose(["train"], split):
        _refuse_links(chosen, [*others, *(each for section in sections for each in _splits_beside(section))])
    classes, below, known = [], False, set(sections)
    class_first = len({section.parent for section in (*sections, *others)}) > 1
    for each in chosen:
        section = next(place for place in (Path(each.path), *Path(each.path).parents) if place in known)
        inside = Path(each.path).relative_to(section).parts
        around = section.parent.relative_to(folder).parts if class_first else ()
        below = below or bool(inside or around)
        classes.append(printable(to_text((inside or around or (section.name,))[-1])))
    root = sections[0] if len(sections) == 1 else Path(os.path.commonpath(sections))
    return ImageFiles(root, sections, chosen, _worth_having(classes if below else None), left_out)


def _worth_having(classes: list[str] | None) -> list[str] | None:
    """None for the one class ``images`` of layouts that have their labels elsewhere."""
    return None if classes and set(map(str.lower, classes)) <= NO_CLASSES else classes


def _without_images(folder: Path, listings: list[Listing]) -> UserError:
    name = printable(to_text(str(folder)))
    left_out = sum((listing.left_out for listing in listings), Counter[str]())
    if not left_out:
        return UserError(f"[data] path: the folder {name!r} is empty; give a folder of images")
    example = next(listing.example for listing in listings if listing.example)
    return UserError(f"[data] path: {name!r} {no_images(left_out, example)}")


def _splits_beside(folder: Path) -> list[Path]:
    """Folders beside one that is named as the training split, which are other splits."""
    place = Path(os.path.abspath(folder))
    if not is_plain(place.name) or [SPLIT_OF[word] for word in split_words(place.name)] != ["train"]:
        return []
    try:
        names = folders_in(place.parent)
    except OSError:
        return []
    found = {name: [SPLIT_OF[word] for word in split_words(name)] for name in names}
    return [place.parent / name for name, splits in found.items() if splits and "train" not in splits]


def _refuse_links(folders: Sequence[ImageFolder], others: Sequence[Path]) -> None:
    """Refuse links from the training split into another, whose images must not be trained on."""
    own = {os.path.realpath(each.path) for each in folders}
    ends = {os.path.realpath(other): other for other in others}
    ends = {real: other for real, other in ends.items() if not (other.is_symlink() and _holds(real, own))}
    if not ends:
        return
    real_folders: dict[str, str] = {}
    for each in folders:
        places = {f"{each.path}/{name}": _end_of_link(f"{each.path}/{name}", real_folders) for name in each.links}
        for path, target in {each.path: os.path.realpath(each.path), **places}.items():
            split = next((other for end, other in ends.items() if _holds(end, {target})), None)
            if split is not None:
                raise UserError(
                    f"[data] path: {printable(to_text(path))} leads by a link into {str(split)!r}, which is another "
                    "split; remove the link, so that no held-out image is trained on"
                )


def _holds(folder: str, places: set[str]) -> bool:
    return any(place == folder or place.startswith(f"{folder}/") for place in places)


def _end_of_link(link: str, real_folders: dict[str, str]) -> str:
    """The file that a link leads to. Folders are looked up once, for there may be a million links into one."""
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(link)
        real = real_folders.setdefault(folder, "") or os.path.realpath(folder)
        real_folders[folder] = real
        link = f"{real}/{name}"
        try:
            link = os.path.join(real, os.readlink(link))
        except OSError:  # no link any more
            break
    return link
