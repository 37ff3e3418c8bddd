"""What a run knows of its images: that they are the same after a resume, and which of them cannot be read."""

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
from sslkit.files.jsonl_writer import Lines
from sslkit.terminal import print_message

DATA = "data.json"  # in the run folder: how many images it is of, and sums of them
IMAGES = "images.parquet"  # in the run folder: the names of its images, in order
SAMPLED = 64  # images whose content is remembered
FEW = 4  # of a stream
MAX_BYTES = 100_000  # of data.json
NAMED = 5  # images that a sentence names


class BadSamples:
    """The images that proved unreadable, each a line of bad_samples.jsonl: index, name, reason, epoch, step.

    Every process knows the same ones; the first writes them. All must be made, and called, by all processes alike.

    Args:
        folder: Run folder.
        source: Images of the run.
        max_share: Share of them, rounded up to whole images, that may be bad.
        start_step: Lines of later steps, left by a run that was killed, do not count.
        active: Whether this process writes.

    Raises:
        UserError: More are known to be bad than may be.
    """

    def __init__(self, folder: Path, source: ImageSource, max_share: float, start_step: int, *, active: bool) -> None:
        self.file, self.source, self.active = folder / "bad_samples.jsonl", source, active
        self.lines = Lines(self.file, print_message)
        self.max_share, self.allowed = max_share, math.ceil(max_share * len(source))
        written = [
            line
            for line in rows_of(self.file)
            if isinstance(line.get("index"), int)
            and isinstance(line.get("name"), str)
            and isinstance(line.get("reason"), str)
            and step_of(line) <= start_step
        ]
        # The folder may be on the first process's machine only.
        self.known = {line["index"]: line for lines in gather_objects(written) for line in lines}
        self._check()

    def drop_later(self, step: int) -> None:
        """Remove the lines of steps after ``step`` from the file; they are not among the known ones."""
        if self.active:
            self.lines.go_back(step)

    def new_in(self, batch: Batch) -> int:
        """How many of this process's bad images are not known yet."""
        return len({each.index for each in batch.bad} - self.known.keys())

    def collect(self, batch: Batch, epoch: int, done: int) -> None:
        """Gather all processes' new bad images of a step and write them down.

        Args:
            batch: This process's part of the global batch.
            epoch: The step's.
            done: Updates made with it.

        Raises:
            UserError: Now there are more than may be.
        """
        here = {each.index: asdict(each) for each in batch.bad}
        everywhere = {index: fields for part in gather_objects(here) for index, fields in part.items()}
        new = [everywhere[index] | {"epoch": epoch, "step": done} for index in sorted(everywhere.keys() - self.known)]
        self.known |= {line["index"]: line for line in new}
        for line in new if self.active else []:
            self.lines.append(line)
        self._check()

    def _check(self) -> None:
        if len(self.known) <= self.allowed:
            return
        named = "; ".join(f"{line['name']} ({line['reason']})" for line in [*self.known.values()][:NAMED])
        raise UserError(
            f"{len(self.known)} of the {len(self.source)} images of {self.source.description} cannot be read, more "
            f"than [data] max_bad_share = {self.max_share:g} allows ({self.allowed}), such as {named}; all are in "
            f"{self.file}, and sslkit data check finds them beforehand"
        )


def same_images(folder: Path, source: ImageSource, max_share: float) -> tuple[ImageSource, list[str]]:
    """The images that a run began with, for one that is continued.

    Files that are gone count as unreadable, and new ones are left out, so that the order of samples stays what it was.

    Args:
        folder: Run folder.
        source: The images that are there now.
        max_share: Share of them that may be gone; see `BadSamples`.

    Returns:
        The source to train on, and what the user should know of it.

    Raises:
        UserError: They are others, or too many are gone.
    """
    file = folder / DATA
    if not file.is_file() or not (folder / "recipe.toml").is_file():  # the recipe is written last
        return source, []
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        before = json.loads(file.read_text(encoding="utf-8"))
        images, digest, sums = before["images"], before["names_sha256"], before.get("content", {})
        if type(images) is not int or not isinstance(digest, str):
            raise ValueError("no number of images or no sum of their names")
        sums = {int(index): str(total) for index, total in sums.items()}
        if any(index < 0 for index in sums):
            raise ValueError("an image before the first")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not readable, so this run cannot be continued: {str(error)[:200]}") from error
    said: list[str] = []
    if images != len(source) or digest != names_digest(source):
        found = _as_it_was(folder, source, max_share)
        if found is None or len(found[0]) != images or names_digest(found[0]) != digest:
            now = f"now {len(source)} are there" if images != len(source) else "now some have other names or sizes"
            raise _changed(folder, source, f"when this run began, with {images} images; {now}")
        source, said = found
    _check_content(folder, source, sums)
    return source, said


def write_images(folder: Path, source: ImageSource) -> None:
    """Write down which images a run begins with, for `same_images`: their names, and what some of them hold."""
    if (folder / DATA).is_file() and (folder / "recipe.toml").is_file():
        return
    for left in (DATA, IMAGES):  # by a start that ended before it was a run
        remove(folder / left)
    if source.root:
        stream = pa.BufferOutputStream()
        parquet.write_table(pa.table({"name": _names(source)}), stream, compression="zstd")
        replace_file(folder / IMAGES, [stream.getvalue().to_pybytes()])
    sampled = SAMPLED if source.table.random_access else FEW  # each takes a row group to read
    digests = {str(index): image_digest(source, index) for index in spread_sample(len(source), sampled)}
    content = {index: digest for index, digest in digests.items() if digest}
    fields = {"images": len(source), "names_sha256": names_digest(source), "content": content}
    replace_text(folder / DATA, json.dumps(fields) + "\n")


def recorded_names_digest(folder: Path) -> str:
    """The sum of the images' names that a run folder has written down; empty if it has none."""
    try:
        return str(json.loads((folder / DATA).read_text(encoding="utf-8"))["names_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _as_it_was(folder: Path, source: ImageSource, max_share: float) -> tuple[ImageSource, list[str]] | None:
    """The source by the names that were written down, if they were and all lie below a folder."""
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
        how = f"{len(gone)} of {len(before)} images are gone, {_few(gone)}"
        raise _changed(folder, source, f"since this run began: {how}")
    said = []
    if gone:
        said.append(f"{len(gone)} images are gone since this run began and count as unreadable, {_few(gone)}")
    if new:
        said.append(f"{new} images are new since this run began and are left out")
    return replace(source, table=MappedTable(table_of(names, source.root))), said


def _check_content(folder: Path, source: ImageSource, sums: dict[int, str]) -> None:
    """See that a spread sample of the images still holds what it held; what cannot be read is another matter."""
    for index, before in sums.items():
        if index < len(source) and (now := image_digest(source, index)) and now != before:
            raise _changed(folder, source, f"since this run began: {source.name(index)} holds something else")


def _names(source: ImageSource) -> pa.ChunkedArray:
    paths = [path.removeprefix(f"{source.root}/") for path in source.paths()]
    return pa.chunked_array([pa.array(paths, pa.string())])


def _few(names: list[str]) -> str:
    return "such as " + ", ".join(map(printable, names[:NAMED]))


def _changed(folder: Path, source: ImageSource, how: str) -> UserError:
    return UserError(
        f"[data] path: {source.description} is not what it was {how}; put the images back, or go on in another folder "
        f"with --resume {folder}"
    )
