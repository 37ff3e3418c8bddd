"""Recipe changes that make a measured step faster. bf16, and slices with BatchNorm, can change the numbers."""

import math
from dataclasses import dataclass

from sslkit.data.tools.packing import sufficient_side
from sslkit.profiling.stage_timer import BACKWARD, COLLECTIVES, STUDENT, TEACHER
from sslkit.profiling.step_profile import Profile
from sslkit.recipe.resolve import Recipe

MIN_WAITING = 0.05  # share of a step spent waiting for data, above which data loading is the bottleneck
MIN_GAIN = 1.05
ASPECT_RATIO = 4 / 3  # of a photograph


@dataclass(frozen=True)
class Change:
    """A change and its estimated effect."""

    what: str  # the key to set, or the command to run
    gain: float  # how many times faster a step would be, computed from the measurements


def changes_that_help(measured: Profile, recipe: Recipe) -> list[Change]:
    """The changes that make a step at least `MIN_GAIN` times faster, the best one first."""
    found = [*_of_data(measured, recipe), *_of_computing(measured, recipe)]
    return sorted((each for each in found if each.gain > MIN_GAIN), key=lambda each: -each.gain)


def _of_data(measured: Profile, recipe: Recipe) -> list[Change]:
    if measured.waiting < MIN_WAITING * measured.step:
        return []
    images, on_gpu, changes = measured.images, measured.peak_bytes is not None, []

    def gain(seconds_per_image: float, workers: int) -> float:
        data = measured.batch * seconds_per_image / max(workers, 1)
        step = max(measured.computing, data) if workers else measured.computing + data
        return measured.step / step

    needed = math.ceil(measured.batch * images.seconds / measured.computing)
    workers = min(needed, measured.cores)
    if on_gpu and workers > measured.workers:
        changes.append(Change(f"set data.workers = {workers}", gain(images.seconds, workers)))
    if on_gpu and recipe.views.device == "cpu":
        left = images.read + images.decode + images.crops
        changes.append(Change('set views.device = "accelerator"', gain(left, measured.workers)))
    side = sufficient_side(recipe.views)
    if (share := side**2 * ASPECT_RATIO / images.pixels) < 1:
        smaller = share * (images.read + images.decode) + images.views
        changes.append(Change(f"run sslkit prepare --side {side}", gain(smaller, measured.workers)))
    return changes


def _of_computing(measured: Profile, recipe: Recipe) -> list[Change]:
    stages, train = measured.stages, recipe.train
    savings = []
    if measured.bf16 is not None:
        passes = share_of_passes(measured) * measured.step
        savings.append(('set train.precision = "bf16"', (1 - measured.bf16) * passes))
    if train.micro_batch:
        savings.append(("set a larger train.micro_batch, or 0, if memory allows", stages[STUDENT] / 2))
    if train.activation_checkpointing:
        savings.append(("set train.activation_checkpointing = false, if memory allows", stages[STUDENT]))
    if measured.processes > 1:
        savings.append(("use a faster network between the processes (at most)", stages[COLLECTIVES]))
    return [Change(what, measured.step / max(measured.step - saved, measured.step / 10)) for what, saved in savings]


def share_of_passes(measured: Profile) -> float:
    """Share of a step that the passes of the backbones take; 1 cannot be exceeded."""
    return (measured.stages[STUDENT] + measured.stages[TEACHER] + measured.stages[BACKWARD]) / measured.step
