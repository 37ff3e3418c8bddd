"""What a run knows of its images: that they are the same after a resume, and which of them cannot be read."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from sslkit.data.loader import Batch
from sslkit.data.source import ImageSource
from sslkit.engine.journal import keep_until, read_lines, step_of
from sslkit.errors import UserError
from sslkit.parts.collectives import gather_objects

MAX_BYTES = 10_000  # of data.json
NAMED = 5  # images that a sentence names


class BadSamples:
    """The images that proved unreadable, each a line of bad_samples.jsonl: index, name, reason, epoch, step.

    Every process knows the same ones; the first writes them. All must be made, and called, by all processes alike.

    Args:
        folder: Run folder.
        source: Images of the run.
        max_share: Share of them, rounded up to whole images, that may be bad.
        start_step: Lines of later steps, left by a run that was killed, are dropped.
        active: Whether this process writes.

    Raises:
        UserError: More are known to be bad than may be.
    """

    def __init__(self, folder: Path, source: ImageSource, max_share: float, start_step: int, *, active: bool) -> None:
        self.file, self.source, self.active = folder / "bad_samples.jsonl", source, active
        self.max_share, self.allowed = max_share, math.ceil(max_share * len(source))
        if active:
            keep_until(self.file, start_step)
        written = [
            line
            for line in read_lines(self.file)
            if isinstance(line.get("index"), int)
            and isinstance(line.get("name"), str)
            and isinstance(line.get("reason"), str)
            and step_of(line) <= start_step
        ]
        # The folder may be on the first process's machine only.
        self.known = {line["index"]: line for lines in gather_objects(written) for line in lines}
        self._check()

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
        if self.active:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in new)
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


def check_same_images(folder: Path, source: ImageSource) -> None:
    """See that a run that is continued sees the images that it began with.

    Raises:
        UserError: Their number or names have changed.
    """
    file = folder / "data.json"
    if not file.is_file():
        return
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        before = json.loads(file.read_text(encoding="utf-8"))
        images, names = before["images"], before["names_sha256"]
        if type(images) is not int or not isinstance(names, str):
            raise ValueError("no number of images or no sum of their names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not readable, so this run cannot be continued: {str(error)[:200]}") from error
    if images != len(source) or names != source.names_digest():
        now = f"now {len(source)} are there" if images != len(source) else "now some have other names or sizes"
        raise UserError(
            f"[data] path: {source.description} has changed since this run began with {images} images, {now}; put them"
            f" back, or go on in another folder with --resume {folder}"
        )


def write_images(folder: Path, source: ImageSource) -> None:
    """Write down which images a run begins with, for `check_same_images`."""
    fields = {"images": len(source), "names_sha256": source.names_digest()}
    aside = folder / ".data.tmp"
    aside.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    aside.replace(folder / "data.json")
