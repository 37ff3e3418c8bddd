"""Image files below a folder, and which of them belong to a split, by the names of folders at any depth.

For example ``train/cat/1.jpg``, ``images/val/1.jpg`` (YOLO), ``test/images/1.jpg`` (Roboflow) and ``cat/train/1.jpg``.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pyarrow as pa

from sslkit.data.formats.folder_listing import (
    ImageFolder,
    Listing,
    display_path,
    folders_in,
    is_image,
    list_images,
    walk_folders,
)
from sslkit.data.formats.hints import no_images
from sslkit.data.formats.mask_files import describe_masks, find_masks, is_mask_folder
from sslkit.data.formats.splits import (
    ALL,
    ALL_HELP,
    KEYWORDS,
    SPLIT_OF,
    choose,
    in_order,
    is_plain,
    may_be_classes,
    no_such_split,
    split_names,
    splits_of_folders,
    what_to_do,
    words_of,
)
from sslkit.errors import UserError

Parts = tuple[str, ...]
# For folders that belong to a split: the split name, and the depth of the folder that has it.
Assigned = dict[Parts, tuple[str, int]]
MAX_LINKS = 40  # that are followed one after the other, as in Linux
NO_CLASSES = frozenset(("images", "image", "imgs", "img", "photos", "pictures", "jpegimages", *KEYWORDS))


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split."""

    root: Path  # the folder that contains all of them
    split_folders: list[Path]  # those that are named after the split; only ``root`` if none is named after a split
    folders: list[ImageFolder]  # those that directly contain images, in order
    classes: list[str] | None  # the class of each of them, or None without a folder per class
    skipped: Counter[str]  # number of files that are not images, by suffix
    notes: list[str] = field(default_factory=list)  # sentences on what else is not read


def find_images(folder: Path, split: str) -> ImageFiles:
    """Find the image files of a split below a folder.

    If there are none, if some folders are named after splits and others are not, or if a link of the training split
    leads into another split, raise `UserError`.
    """
    if split != ALL and (top_level := _top_level_splits(folder)):  # folders of other splits are not searched
        own, others = _divide({folder / path: name for path, name in top_level.items()}, folder, split)
        listing, notes = _without_masks(folder, list_images(folder, own))
        beside = sum(map(is_image, next(walk_folders(str(folder)))[1]))
    else:
        listing, notes = list_images(folder), []
        if not listing.folders:
            raise no_images(display_path(folder), listing.skipped, listing.example)
        if split != ALL:
            listing, notes = _without_masks(folder, listing)
        assigned = {} if split == ALL else _split_folders_of(folder, [each.path for each in listing.folders])
        if not assigned:
            return _whole(folder, listing, notes, split)
        own, others = _divide({path: name for name, path in assigned.values()}, folder, split)
        beside = sum(len(each.images) for each in listing.folders if each.path not in assigned)
        chosen = {path for path, (_, split_folder) in assigned.items() if split_folder in own}
        listing = replace(listing, folders=[each for each in listing.folders if each.path in chosen])
    if beside:
        notes.append(f"images beside the folders of the splits, left out: {beside:,}")
    return _of_split_folders(folder, (own, others), listing, notes, split)


def _divide(named: dict[Path, str], folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The folders of a split, and those of other splits, by their split names."""
    names = choose(in_order(named.values()), split)
    if not names:
        raise no_such_split(str(folder), "folders", set(named.values()), split)
    own = sorted(path for path, name in named.items() if name in names)
    return own, sorted(named.keys() - set(own))


def _whole(folder: Path, listing: Listing, notes: list[str], split: str) -> ImageFiles:
    """All images below a folder without splits, with its subfolders as classes."""
    if split != ALL and not choose(["train"], split):
        raise UserError(
            f"[data] split: {str(folder)!r} has no folder {split!r}; it has {folders_in(folder)[:8]}, none of them "
            "named like a split; leave split out to read all images"
        )
    if split != ALL:
        _refuse_links(listing.folders, _other_splits_beside(folder))
    return ImageFiles(folder, [folder], listing.folders, _meaningful(listing.classes), listing.skipped, notes)


def image_splits(folder: Path) -> list[str]:
    """The split names of folders with images; empty if no folder has one."""
    if top_level := _top_level_splits(folder):
        return in_order(top_level.values())
    paths = [path for path, files, _ in walk_folders(str(folder)) if any(map(is_image, files))]
    masks = _mask_folders(folder, paths)
    return in_order(name for name, _ in _split_folders_of(folder, [p for p in paths if p not in masks]).values())


def refuse_several_folders(files: Sequence[str], split: str) -> None:
    """Refuse image files that match patterns if their folders are of several splits."""
    folders = sorted({os.path.dirname(file) or "." for file in files if not os.path.isdir(file)})
    if split == ALL or not folders:
        return
    common = os.path.commonpath(folders)
    assigned = _assign_splits([Path(folder).relative_to(common).parts for folder in folders], common)
    names = in_order({name for name, _ in assigned.values()})
    if len({SPLIT_OF[name] for name in names}) > 1:
        raise UserError(
            f"[data] data_files: they are of several splits, {names}; name the files of one, or give the folder by "
            f"data_dir and [data] split; {ALL_HELP}"
        )


def folders_of_split(names: Sequence[str], split: str, where: str) -> tuple[set[str], list[str]]:
    """Divide folders in tar files into those of a split and those left out: of other splits, or of masks.

    If all folders are of one split, none is left out for its split. If some are of splits and others are not, or none
    is of the requested split, raise `UserError`. ``where`` is how messages name the tar files.
    """
    root = Path("/")
    paths = {f"/{name}": name for name in names}
    masks = _mask_folders(root, list(paths))
    parts = {path: each for path, each in _parts_below(root, list(paths)).items() if path not in masks}
    assigned = _assign_splits(list(parts.values()), where)
    available = {name for name, _ in assigned.values()}
    wanted = {paths[path] for path in parts}
    if len({SPLIT_OF[name] for name in available}) > 1:
        unassigned = [paths[path] for path, part in parts.items() if part not in assigned]
        if unassigned and may_be_classes({part[depth] for part, (_, depth) in assigned.items()}):
            return wanted, sorted(set(names) - wanted)
        if unassigned:
            raise UserError(
                f"[data] path: {where!r} has folders of splits and others in it: splits {sorted(available)}, others "
                f"{sorted(unassigned)[:8]}; unpack it, and give the folder of the split as path; {ALL_HELP}"
            )
        chosen = choose(in_order(available), split)
        if not chosen:
            raise no_such_split(where, "folders in it", available, split)
        wanted = {paths[path] for path, part in parts.items() if assigned[part][0] in chosen}
    return wanted, sorted(set(names) - wanted)


def _top_level_splits(folder: Path) -> dict[str, str]:
    """Split names of the subfolders if all of them have one, so that those of other splits need not be walked."""
    names = folders_in(folder)
    if not names or not all(len(split_names(name)) == 1 and not is_mask_folder(name) for name in names):
        return {}
    return splits_of_folders(names, str(folder))


def _without_masks(root: Path, listing: Listing) -> tuple[Listing, list[str]]:
    """A listing without masks and the like, in folders of their own or beside images, and notes on them."""
    notes: list[str] = []
    if masks := _mask_folders(root, [each.path for each in listing.folders]):
        count = sum(len(each.images) for each in listing.folders if each.path in masks)
        names = sorted(os.path.relpath(path, root) for path in masks)
        notes.append(
            f"masks and the like beside images, left out: {count:,}, in {names[:4]}; name such a folder itself to read "
            "it"
        )
        listing = replace(listing, folders=[each for each in listing.folders if each.path not in masks])
    if not listing.folders:
        return listing, notes
    paths = pa.chunked_array([each.images for each in listing.folders])
    is_mask = find_masks(paths)
    if is_mask is None:
        return listing, notes
    folders, first = [], 0
    for each in listing.folders:
        kept = ~is_mask[first : first + len(each.images)]
        first += len(each.images)
        folders.append(each if kept.all() else replace(each, images=each.images.filter(pa.array(kept))))
    return replace(listing, folders=folders), [*notes, describe_masks(paths, is_mask)]


def _mask_folders(root: Path, paths: Sequence[str]) -> set[str]:
    """Folders of masks and the like: they have such a name, and a sibling is named like images or a split."""
    if not any(is_mask_folder(path) for path in paths):
        return set()
    masks: set[str] = set()
    parts = _parts_below(root, paths)
    siblings: dict[Parts, set[str]] = {}
    for part in parts.values():
        for depth, name in enumerate(part):
            siblings.setdefault(part[:depth], set()).add(name)
    for path, part in parts.items():
        for depth, name in enumerate(part):
            others = [other for other in siblings[part[:depth]] if not is_mask_folder(other)]
            if is_mask_folder(name) and any(is_plain(other) and words_of(other) for other in others):
                masks.add(path)
    return masks


def _parts_below(root: Path, paths: Sequence[str]) -> dict[str, Parts]:
    """The components of each path below ``root``."""
    skipped = len(str(root).rstrip("/")) + 1
    return {path: tuple(path[skipped:].split("/")) if len(path) > skipped else () for path in paths}


def _split_folders_of(root: Path, paths: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """The split name of each folder with images, and the folder that has this name; folders above these are omitted."""
    parts = _parts_below(root, paths)
    assigned = _assign_splits(list(parts.values()), str(root))
    if not assigned:
        return {}
    above = {part[:depth] for part, (_, depth) in assigned.items()}
    unassigned = [path for path in paths if parts[path] not in assigned and parts[path] not in above]
    if unassigned and may_be_classes({part[depth] for part, (_, depth) in assigned.items()}):
        return {}
    if unassigned:
        named = {"/".join(part[: depth + 1]): name for part, (name, depth) in assigned.items()}
        raise UserError(
            f"[data] path: {str(root)!r} has folders of splits and others: splits {sorted(named)[:8]}, others "
            f"{['/'.join(parts[path]) for path in unassigned[:8]]}; {what_to_do(str(root), named)}"
        )
    return {
        path: (assigned[part][0], root.joinpath(*part[: assigned[part][1] + 1]))
        for path, part in parts.items()
        if part in assigned
    }


def _assign_splits(paths: Sequence[Parts], where: str, depth: int = 0) -> Assigned:
    """Find the first component of each path that is a split; paths without one are omitted."""
    children: dict[str, list[Parts]] = {}
    for path in paths:
        if len(path) > depth:
            children.setdefault(path[depth], []).append(path)
    names = splits_of_folders(sorted(children), where)
    assigned: Assigned = {}
    for child, inside in children.items():
        if child in names:
            assigned.update(dict.fromkeys(inside, (names[child], depth)))
        else:
            assigned.update(_assign_splits(inside, f"{where}/{child}", depth + 1))
    return assigned


def _of_split_folders(
    folder: Path, divided: tuple[list[Path], list[Path]], listing: Listing, notes: list[str], split: str
) -> ImageFiles:
    """The images of the folders of a split. Class folders lie in the split's folder or contain it."""
    own, others = divided
    if not listing.folders:
        raise no_images(display_path(own[0]), listing.skipped, listing.example)
    if choose(["train"], split):
        _refuse_links(listing.folders, [*others, *(each for path in own for each in _other_splits_beside(path))])
    classes, has_classes, known = [], False, set(own)
    class_first = len({path.parent for path in (*own, *others)}) > 1
    for each in listing.folders:
        split_folder = next(path for path in (Path(each.path), *Path(each.path).parents) if path in known)
        inside = Path(each.path).relative_to(split_folder).parts
        around = split_folder.parent.relative_to(folder).parts if class_first else ()
        has_classes = has_classes or bool(inside or around)
        classes.append(display_path((inside or around or (split_folder.name,))[-1]))
    meaningful = _meaningful(classes if has_classes else None)
    return ImageFiles(Path(os.path.commonpath(own)), own, listing.folders, meaningful, listing.skipped, notes)


def _meaningful(classes: list[str] | None) -> list[str] | None:
    """None instead of the single class ``images`` of layouts that store their labels elsewhere."""
    return None if classes and set(map(str.lower, classes)) <= NO_CLASSES else classes


def _other_splits_beside(folder: Path) -> list[Path]:
    """If a folder is named like the training split: its siblings that are other splits."""
    path = Path(os.path.abspath(folder))
    if not is_plain(path.name) or [SPLIT_OF[name] for name in split_names(path.name)] != ["train"]:
        return []
    siblings = folders_in(path.parent) if os.access(path.parent, os.R_OK) else []
    splits = {sibling: [SPLIT_OF[name] for name in split_names(sibling)] for sibling in siblings}
    return [path.parent / sibling for sibling, found in splits.items() if found and "train" not in found]


def _refuse_links(folders: Sequence[ImageFolder], others: Sequence[Path]) -> None:
    """Refuse links from the training split into another split, whose images must not be trained on."""
    own = {os.path.realpath(each.path) for each in folders}
    targets = {os.path.realpath(other): other for other in others}
    targets = {real: other for real, other in targets.items() if not (other.is_symlink() and _contains(real, own))}
    if not targets:
        return
    real_folder = cache(os.path.realpath)  # resolves each folder once, as there may be a million links into one
    for each in folders:
        links = {f"{each.path}/{name}": _resolve_link(f"{each.path}/{name}", real_folder) for name in each.links}
        for path, target in {each.path: os.path.realpath(each.path), **links}.items():
            split = next((other for real, other in targets.items() if _contains(real, {target})), None)
            if split is not None:
                raise UserError(
                    f"[data] path: {display_path(path)} is a link into {str(split)!r}, which is another split; "
                    "remove the link, so that no held-out image is trained on"
                )


def _contains(folder: str, paths: set[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for path in paths)


def _resolve_link(link: str, real_folder: Callable[[str], str]) -> str:
    """The file that a link leads to."""
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(link)
        link = f"{real_folder(folder)}/{name}"
        try:
            link = os.path.join(real_folder(folder), os.readlink(link))
        except OSError:  # no further link
            break
    return link
