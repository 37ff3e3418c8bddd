"""The images of a run: check that they are the same when it is resumed, and record which cannot be read."""

import json
import math
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import pyarrow as pa
from pyarrow import parquet
from pydantic import BaseModel, Field

from sslkit.command_line import free_folder, same_command
from sslkit.data.batch import Batch
from sslkit.data.formats.folder_listing import printable, table_of
from sslkit.data.sources.image_identity import image_digest, names_digest, spread_sample
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.sources.image_table import MappedTable
from sslkit.distributed.collectives import gather_objects
from sslkit.errors import UserError, first_line
from sslkit.files.atomic import remove, replace_file, replace_text
from sslkit.files.json_reader import read_json
from sslkit.files.jsonl_reader import rows_of, step_of
from sslkit.files.jsonl_writer import JsonlWriter
from sslkit.terminal import print_message
from sslkit.text import pluralize

DATA = "data.json"  # in the run folder: number of images and digests
IMAGES = "images.parquet"  # in the run folder: names of the images, in order
NUM_DIGESTS = 64  # images whose content is recorded
NUM_DIGESTS_STREAMED = 4
MAX_BYTES = 100_000  # of data.json
MAX_NAMED = 5  # images that a message names


class BadSamples:
    """The unreadable images of a run, one row of bad_samples.jsonl each: index, name, reason, epoch, step.

    All processes know the same images, as each creates an instance and makes the same calls; the ``active`` one writes.
    Rows after ``start_step``, left by a killed run, do not count.

    Raises:
        UserError: Too many images are bad: more than ``max_share``, rounded up to whole images.
    """

    def __init__(self, folder: Path, source: ImageSource, max_share: float, start_step: int, *, active: bool) -> None:
        self.file, self.source, self.active = folder / "bad_samples.jsonl", source, active
        self.writer = JsonlWriter(self.file, print_message)
        self.max_share, self.allowed = max_share, math.ceil(max_share * len(source))
        recorded = [row for row in rows_of(self.file) if step_of(row) <= start_step]
        # Only the machine of the first process may have the folder.
        self.known = {row["index"]: row for rows in gather_objects(recorded) for row in rows}
        self._check()

    def drop_later(self, step: int) -> None:
        """Remove the rows of steps after ``step`` from the file."""
        if self.active:
            self.writer.remove_after(step)

    def new_in(self, batch: Batch) -> int:
        """Number of bad images of this process's batch that are not known yet."""
        return len({image.index for image in batch.bad} - self.known.keys())

    def collect(self, batch: Batch, epoch: int, done: int) -> None:
        """Record the new bad images of a step of all processes, if they are not too many; ``done`` counts this step."""
        here = {image.index: asdict(image) for image in batch.bad}
        everywhere = {index: fields for part in gather_objects(here) for index, fields in part.items()}
        new = [everywhere[index] | {"epoch": epoch, "step": done} for index in sorted(everywhere.keys() - self.known)]
        self.known |= {row["index"]: row for row in new}
        for row in new if self.active else []:
            self.writer.append(row)
        self._check()

    def _check(self) -> None:
        if len(self.known) <= self.allowed:
            return
        named = "; ".join(f"{row['name']} ({row['reason']})" for row in [*self.known.values()][:MAX_NAMED])
        raise UserError(
            f"{len(self.known)} of the {len(self.source)} images of {self.source.description} cannot be read, more "
            f"than [data] max_bad_share = {self.max_share:g} allows ({self.allowed}), such as {named}; {self.file} "
            "lists all, and sslkit data check finds them before training"
        )


class RecordedImages(BaseModel):
    """The content of ``data.json``."""

    images: int = Field(strict=True)
    names_sha256: str
    content: dict[Annotated[int, Field(ge=0)], str] = {}  # digests of a few images, by index


def restore_images(folder: Path, source: ImageSource, max_share: float) -> tuple[ImageSource, list[str]]:
    """The images that a run started with, for a run that is resumed, and messages to log.

    Of the images that exist now, new ones are ignored, and missing ones count as unreadable (at most ``max_share``, see
    `BadSamples`), so that the order of samples does not change.

    Raises:
        UserError: The images have changed, or too many are missing.
    """
    file = folder / DATA
    if not file.is_file() or not (folder / "recipe.toml").is_file():  # the recipe is written last
        return source, []
    try:
        before = read_json(file, RecordedImages, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable, so this run cannot be resumed: {first_line(error)}") from error
    messages: list[str] = []
    if before.images != len(source) or before.names_sha256 != names_digest(source):
        found = _with_recorded_names(folder, source, max_share)
        if found is None or len(found[0]) != before.images or names_digest(found[0]) != before.names_sha256:
            same_count = before.images == len(source)
            now = "some have other names or sizes now" if same_count else f"there are {len(source)} now"
            raise _changed(folder, source, f"it had {before.images} images, {now}")
        source, messages = found
    # Compare the content of a few images; one that cannot be read has no digest and is not compared.
    for index, digest in before.content.items():
        if index < len(source) and (now := image_digest(source, index)) and now != digest:
            raise _changed(folder, source, f"{source.name(index)} has other content")
    return source, messages


def write_images(folder: Path, source: ImageSource) -> None:
    """Record the names of the images that a run starts with, and digests of a few, for `restore_images`."""
    if (folder / DATA).is_file() and (folder / "recipe.toml").is_file():
        return
    for name in (DATA, IMAGES):  # left by a start that was killed before it wrote the recipe
        remove(folder / name)
    if source.root:
        stream = pa.BufferOutputStream()
        parquet.write_table(pa.table({"name": _names(source)}), stream, compression="zstd")
        replace_file(folder / IMAGES, [stream.getvalue().to_pybytes()])
    num_digests = NUM_DIGESTS if source.table.random_access else NUM_DIGESTS_STREAMED  # each reads a row group
    sample = spread_sample(len(source), num_digests)
    content = {index: digest for index in sample if (digest := image_digest(source, index))}
    fields = {"images": len(source), "names_sha256": names_digest(source), "content": content}
    replace_text(folder / DATA, json.dumps(fields) + "\n")


def recorded_names_digest(folder: Path) -> str:
    """The digest of the image names that a run folder has recorded; empty if there is none."""
    try:
        return read_json(folder / DATA, RecordedImages, MAX_BYTES).names_sha256
    except (OSError, ValueError):
        return ""


def _with_recorded_names(folder: Path, source: ImageSource, max_share: float) -> tuple[ImageSource, list[str]] | None:
    """The source with the recorded names; None if there are none, or the images are not files below one folder."""
    try:
        if not source.root or not stat.S_ISREG((folder / IMAGES).lstat().st_mode):
            return None
        names = parquet.read_table(folder / IMAGES, columns=["name"])["name"].cast(pa.string())
    except (OSError, pa.ArrowException):
        return None
    before, now = set(names.to_pylist()), set(_names(source).to_pylist())
    if any(name is None or ".." in name.split("/") for name in before):
        return None
    gone, new = sorted(before - now), len(now - before)
    if len(gone) > math.ceil(max_share * len(before)):
        raise _changed(folder, source, f"{len(gone)} of {len(before)} images are missing, {_examples(gone)}")
    messages = []
    if gone:
        verb = "is missing and counts" if len(gone) == 1 else "are missing and count"
        messages.append(f"{pluralize(len(gone), 'image')} of this run {verb} as unreadable, {_examples(gone)}")
    if new:
        verb = "was added after this run started and is" if new == 1 else "were added after this run started and are"
        messages.append(f"{pluralize(new, 'image')} {verb} ignored")
    return replace(source, table=MappedTable(table_of(names, source.root))), messages


def _names(source: ImageSource) -> pa.ChunkedArray:
    paths = [path.removeprefix(f"{source.root}/") for path in source.paths()]
    return pa.chunked_array([pa.array(paths, pa.string())])


def _examples(names: list[str]) -> str:
    return "such as " + ", ".join(map(printable, names[:MAX_NAMED]))


def _changed(folder: Path, source: ImageSource, change: str) -> UserError:
    command = same_command(output=free_folder(folder), resume=str(folder))
    return UserError(
        f"[data] path: {source.description} has changed since this run started: {change}; restore the images, or "
        f"train its newest checkpoint on with these in a new folder: {command}"
    )
