"""What a plan depends on: the images, the machine and the time."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.loading.loader import cores_of_a_process
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.inspection import channel_moments, count_alpha, describe_alpha
from sslkit.distributed.collectives import processes_started
from sslkit.doctor.image_checks import count_copies, describe_copies, different_images, summarise_images
from sslkit.doctor.machine_checks import GIB, has_bf16, memory_of_device
from sslkit.engine.runtime.precision import training_device
from sslkit.errors import UserError
from sslkit.text import pluralize

MIN_IMAGES = 16  # fewer give no batch worth learning from
NORMALISED = 32  # images whose channels are averaged


@dataclass(frozen=True)
class Facts:
    """What the rules may use."""

    count: int  # images
    height: int  # median of a sample, in pixels, as is the width
    width: int
    grey: bool  # all sampled images are greyscale
    moments: tuple[list[float], list[float]] | None  # mean and deviation of each channel in [0, 1]; None for RGB
    alpha: str  # a sentence, if some images have an alpha channel
    copies: int  # files that equal another one, of ``compared``
    compared: int
    classes: int  # labels; 0 without. Used to monitor the run, not to train
    device: str  # "cpu", "cuda" or "mps"
    bf16: bool  # the device computes in bf16 natively
    memory: int  # of the device, in bytes
    cores: int  # usable by a process
    processes: int
    hours: float  # time for the run
    sides: tuple[int, int, int] | None = None  # the shorter sides in the sample: least, median, largest; or not known

    @property
    def short_side(self) -> int:
        """The median of the shorter sides of the images, in pixels."""
        return self.sides[1] if self.sides else min(self.height, self.width)

    @property
    def range_of_sides(self) -> str:
        """``64 (the median; from 8 to 1000)``: the shorter sides in pixels; the median alone if all are equal."""
        least, _, largest = self.sides or (self.short_side,) * 3
        return f"{self.short_side}" + (f" (the median; from {least} to {largest})" if least < largest else "")

    @property
    def different(self) -> int:
        """Number of images that differ, as far as they were compared."""
        return max(different_images(self.count, self.copies, self.compared), min(self.count, MIN_IMAGES))

    def lines(self) -> list[str]:
        """A line about the images, one about the machine, and one about whatever is wrong with the images."""
        kind = f"{len(self.moments[0])}-channel" if self.moments else "grey" if self.grey else "colour"
        classes = f", {self.classes} classes" if self.classes > 1 else ", no labels"
        device = {"cpu": "CPU, " + pluralize(self.cores, "core"), "cuda": "GPU", "mps": "Apple GPU"}[self.device]
        size = f"about {self.width} x {self.height} pixels"
        if self.sides and self.sides[0] < self.sides[2]:
            size += f" (medians; shorter side from {self.sides[0]} to {self.sides[2]})"
        lines = [
            f"images: {self.count}, {kind}, {size}{classes}",
            f"machine: {device}, {self.memory / GIB:.0f} GiB"
            + (f", {self.processes} processes" if self.processes > 1 else ""),
        ]
        if self.alpha:
            lines.append(self.alpha)
        if self.copies:
            lines.append(describe_copies(self.copies, self.compared))
        return lines


def gather_facts(source: ImageSource, hours: float) -> Facts:
    """Read a sample of the images, and look at the machine.

    Raises:
        UserError: There are too few images to train on.
    """
    if len(source) < MIN_IMAGES:
        raise UserError(
            f"--data: {source.description} has {pluralize(len(source), 'image')}; pretraining needs {MIN_IMAGES} or "
            "more, and begins to help with some thousands. Use public weights as they are: sslkit eval knn with a timm "
            "name such as resnet18.a1_in1k"
        )
    images, device = summarise_images(source), training_device()
    copies, compared = count_copies(source)
    return Facts(
        count=len(source),
        height=images.height,
        width=images.width,
        grey=images.grey,
        moments=None if source.channels is None else _moments(source),
        alpha=describe_alpha(source) if source.channels is None and count_alpha(source)[0] else "",
        copies=copies,
        compared=compared,
        classes=_count_classes(source),
        device=device.type,
        bf16=device.type == "cuda" and has_bf16(device),
        memory=memory_of_device(device),
        cores=cores_of_a_process(1),
        processes=processes_started(),
        hours=hours,
        sides=images.sides,
    )


def _moments(source: ImageSource) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over a sample of the images."""
    chosen = np.linspace(0, len(source) - 1, min(NORMALISED, len(source)), dtype=int)
    each = []
    for index in chosen:
        with suppress(UnreadableImage):
            each.append(channel_moments(source.read(int(index))))
    means, deviations = (np.stack(values) for values in zip(*each, strict=True))
    mean = means.mean(axis=0)
    deviation = np.sqrt(np.maximum((deviations**2 + means**2).mean(axis=0) - mean**2, 0.0))
    return mean.round(4).tolist(), deviation.clip(min=1e-3).round(4).tolist()


def _count_classes(source: ImageSource) -> int:
    try:
        return len(set(source.labels()))
    except UserError:
        return 0
