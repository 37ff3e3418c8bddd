"""The images of a run: check that they are the same when it is resumed, and record which cannot be read."""

import json
import math
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from sslkit.data.batch import Batch
from sslkit.data.formats.folder_listing import printable, table_of
from sslkit.data.sources.image_identity import image_digest, names_digest, spread_sample
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.sources.image_table import MappedTable
from sslkit.distributed.collectives import gather_objects
from sslkit.errors import UserError
from sslkit.files.atomic import remove, replace_file, replace_text
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

    All processes know the same images; the first writes them. Every process must create an instance and make the same
    calls.

    Args:
        folder: Run folder.
        source: Images of the run.
        max_share: Largest share of bad images, rounded up to whole images.
        start_step: Rows of later steps, left by a killed run, do not count.
        active: Whether this process writes.

    Raises:
        UserError: Too many images are bad.
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
        """Gather the new bad images of a step from all processes and record them.

        Args:
            batch: This process's part of the global batch.
            epoch: Epoch of the step.
            done: Number of updates, including this step's.

        Raises:
            UserError: Too many images are bad.
        """
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


def restore_images(folder: Path, source: ImageSource, max_share: float) -> tuple[ImageSource, list[str]]:
    """The images that a run started with, for a run that is resumed.

    Missing files count as unreadable and new files are ignored, so that the order of samples does not change.

    Args:
        folder: Run folder.
        source: The images that exist now.
        max_share: Largest share of missing images; see `BadSamples`.

    Returns:
        The source to train on, and messages to log.

    Raises:
        UserError: The images have changed, or too many are missing.
    """
    file = folder / DATA
    if not file.is_file() or not (folder / "recipe.toml").is_file():  # the recipe is written last
        return source, []
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        before = json.loads(file.read_text(encoding="utf-8"))
        count, digest, content = before["images"], before["names_sha256"], before.get("content", {})
        if type(count) is not int or not isinstance(digest, str):
            raise ValueError("images must be a number and names_sha256 a string")
        content = {int(index): str(image) for index, image in content.items()}
        if any(index < 0 for index in content):
            raise ValueError("content has a negative index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not readable, so this run cannot be resumed: {str(error)[:200]}") from error
    messages: list[str] = []
    if count != len(source) or digest != names_digest(source):
        found = _with_recorded_names(folder, source, max_share)
        if found is None or len(found[0]) != count or names_digest(found[0]) != digest:
            now = f"there are {len(source)} now" if count != len(source) else "some have other names or sizes now"
            raise _changed(folder, source, f"it had {count} images, {now}")
        source, messages = found
    # Compare the content of a few images; one that cannot be read has no digest and is not compared.
    for index, before in content.items():
        if index < len(source) and (now := image_digest(source, index)) and now != before:
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
    digests = {str(index): image_digest(source, index) for index in spread_sample(len(source), num_digests)}
    content = {index: digest for index, digest in digests.items() if digest}
    fields = {"images": len(source), "names_sha256": names_digest(source), "content": content}
    replace_text(folder / DATA, json.dumps(fields) + "\n")


def recorded_names_digest(folder: Path) -> str:
    """The digest of the image names that a run folder has recorded; empty if there is none."""
    try:
        return str(json.loads((folder / DATA).read_text(encoding="utf-8"))["names_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
    return UserError(
        f"[data] path: {source.description} has changed since this run started: {change}; restore the images, or "
        f"continue in another folder with --resume {folder}"
    )
