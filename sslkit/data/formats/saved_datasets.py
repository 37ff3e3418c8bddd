"""Folders that ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` wrote: their own lists name their files.

Other Arrow files lie there too: ``cache-*.arrow``, which a later ``map`` or ``filter`` left.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from sslkit.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"
CACHE = re.compile(r"cache-[0-9a-f]{16}.*\.arrow", re.IGNORECASE)


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split, in order; one split ``""`` where there are none; None for a folder of another kind.

    Raises:
        UserError: A list is broken or names what is not there.
    """
    if (folder / SPLITS).is_file():
        splits = _read(folder / SPLITS, "splits")
        if not all(isinstance(name, str) and _is_plain(name) for name in splits):
            raise _broken(folder / SPLITS, "names of splits")
        return {name: _files(folder / name) for name in splits}
    return {"": _files(folder)} if (folder / STATE).is_file() else None


def without_caches(files: list[Path]) -> list[Path]:
    """Files without those that ``map`` and ``filter`` leave, unless there are no others."""
    return [file for file in files if not CACHE.fullmatch(file.name)] or files


def _files(folder: Path) -> list[Path]:
    entries = _read(folder / STATE, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise _broken(folder / STATE, "names of files in this folder")
    files = [folder / str(name) for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"[data] path: {folder / STATE} names {missing[0].name!r}, which is not there; save it again")
    return files


def _is_plain(name: str) -> bool:
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def _read(file: Path, key: str) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"[data] path: {file} cannot be read: {str(error)[:100]}; save the data set again") from error
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise _broken(file, key)
    return found


def _broken(file: Path, what: str) -> UserError:
    return UserError(f"[data] path: {file} has no {what} as datasets' save_to_disk writes it; save the data set again")
