"""Continue public weights on own images, judge the result, and hand back the better encoder."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sslkit.adapt.adapt_recipe import Wishes, adaptation_recipe, input_sizes, kept_every, look_at
from sslkit.adapt.adapted_points import points_of, write_answer
from sslkit.adapt.answer import Answer
from sslkit.adapt.judging import Judge
from sslkit.adapt.start_weights import read_start
from sslkit.command_line import free_folder, same_command
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.distributed.collectives import processes_started
from sslkit.doctor.image_checks import ImageSummary
from sslkit.engine.run_folder.resume import keep_earlier_defaults
from sslkit.engine.setup import build_method
from sslkit.engine.trainer import train
from sslkit.errors import UserError
from sslkit.profiling.step_profile import profile
from sslkit.recipe.resolve import Recipe, changes, load_saved
from sslkit.text import format_duration, pluralize

DEFAULT_HOURS, MEASURED_SECONDS = 1.0, 10.0
MAX_EPOCHS = 20
MAX_LISTED = 5  # keys that a message lists
PLANNED_SHARE = 0.9  # of the time; the rest is for linear probes and for estimates that were too low
# Share of the time that judging the untouched encoder at one more size may take, where the size is stated and not.
OTHER_SIZE_SHARE, SIZE_SHARE = 0.1, 0.3
STORE = "features"  # in the output folder
LogMessage = Callable[[str], None]


@dataclass(frozen=True)
class AdaptOptions:
    """What an adaptation may use.

    Attributes:
        labelled: Labelled images that the verdict is given on; None for none.
        retain: A second labelled set, whose loss would be forgetting.
        wishes: Way, size, epochs and stated keys.
        hours: Time for training and judging, if the epochs are not stated.
        log_message: Called with a line of text at each stage.
    """

    labelled: DataConfig | None = None
    retain: DataConfig | None = None
    wishes: Wishes = field(default_factory=Wishes)
    hours: float = DEFAULT_HOURS
    log_message: LogMessage = lambda _message: None


@dataclass(frozen=True)
class AdaptResult:
    """An adaptation.

    Attributes:
        folder: Holds ``encoder/`` (the answer), ``run/`` (the run folder) and ``answer.json``.
        answer: None if training was stopped on request; the same call continues it.
        stopped: Why; empty if it was not.
    """

    folder: Path
    answer: Answer | None
    stopped: str = ""


def adapt_weights(
    weights: str, data: DataConfig, output: str | Path, options: AdaptOptions | None = None
) -> AdaptResult:
    """Continue weights on images without labels, and compare the end with the start, image by image.

    The encoder that is written is the adapted one if it is better than the start, else the start.

    Args:
        weights: What every command takes as MODEL: timm name, ``hf_hub:user/name``, exported folder or run.
        data: The images.
        output: New folder, or one of the same adaptation, which is continued.
        options: Labelled images, way, size and time.

    Raises:
        UserError: Weights, images, options or folder cannot be used.
    """
    options, begin = options or AdaptOptions(), time.monotonic()
    if processes_started() > 1:
        raise UserError("sslkit adapt runs in 1 process; to train on several, set [adapt] in a recipe of pretrain")
    folder, wishes = Path(output), options.wishes
    start, source = read_start(weights), open_source(data).without_labels()
    images = look_at(source, "--data")
    sizes = input_sizes(start, images, wishes.size)
    table: dict[str, Any] = data.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    saved = _saved_recipe(folder, partial(adaptation_recipe, start, table, images), wishes)
    if saved is None:  # mistakes are found before anything that takes minutes
        recipes = (adaptation_recipe(start, table, images, size, wishes) for size in sizes)
        with torch.random.fork_rng(devices=[]):
            _check_one_is_possible(recipes, len(source))
    judge = Judge(source, options.labelled, options.retain, folder / STORE, options.log_message)
    required = saved.views.size if saved else wishes.size
    if saved:
        sizes = sorted({*sizes, required}) if options.labelled else [required]
    share = OTHER_SIZE_SHARE if wishes.size else SIZE_SHARE
    limit = 3600 * options.hours * share
    size = judge.judge_start(start, sizes, required, limit, compares_sizes=not wishes.size)
    recipe = saved
    if recipe is None:
        left = 3600 * options.hours * PLANNED_SHARE - (time.monotonic() - begin)
        make = partial(adaptation_recipe, start, table, images, size)
        recipe = _new_recipe(make, images, options, partial(judge.seconds_at_end, size), left)
    options.log_message(
        f"training: {recipe.method_name}, views of {size} px, batch {recipe.train.batch_size}, "
        f"{pluralize(recipe.train.epochs, 'epoch')}, [adapt] {_stated(recipe)}"
    )
    run = train(recipe, folder / "run")
    if run.stopped:
        return AdaptResult(folder, None, run.stopped)
    points = points_of(run.folder, recipe, judge.start_at(size))
    answer, chosen = judge.judge_end(points, size)
    encoder = chosen.encoder if answer.gained else judge.start_at(answer.size)
    write_answer(folder, encoder, answer, chosen.step, judge.description)
    return AdaptResult(folder, answer)


def _check_one_is_possible(recipes: Iterable[Recipe], num_images: int) -> None:
    """Build the method of the recipes until one can be built; otherwise raise what is wrong with the first."""
    problem: UserError | None = None
    for recipe in recipes:
        try:
            build_method(recipe, num_images)
        except UserError as error:
            problem = problem or error
        else:
            return
    if problem:
        raise problem


def _saved_recipe(folder: Path, make: Callable[[int, Wishes], Recipe], wishes: Wishes) -> Recipe | None:
    """The recipe of the adaptation that a folder holds; None if it holds none. ``make`` makes the one asked for.

    Raises:
        UserError: The folder holds something else, or an adaptation with other settings.
    """
    file = folder / "run" / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; {_elsewhere(folder)}")
    if not file.is_file():
        if folder.exists() and any(entry.name not in ("run", STORE) for entry in folder.iterdir()):
            raise UserError(f"--output {folder}: is not empty and holds no adaptation; {_elsewhere(folder)}")
        return None
    saved = load_saved(file)
    size, epochs = wishes.size or saved.views.size, wishes.epochs or saved.train.epochs
    asked, _ = keep_earlier_defaults(file.parent, make(size, replace(wishes, epochs=epochs)))
    if changed := changes(saved.as_tables(), asked.as_tables()):
        raise UserError(
            f"--output {folder}: holds an adaptation with other settings ({'; '.join(changed[:MAX_LISTED])}); "
            f"{_elsewhere(folder)}"
        )
    return saved


def fitting_epochs(epoch: float, seconds_at_end: Callable[[int], float], left: float) -> tuple[int, float]:
    """The most epochs, at least 1, that fit into the seconds that are left, and the seconds for judging after them."""
    judging = {n: seconds_at_end(math.ceil(n / kept_every(n))) for n in range(1, MAX_EPOCHS + 1)}
    epochs = max((n for n, seconds in judging.items() if n * epoch + seconds <= left), default=1)
    return epochs, judging[epochs]


def _elsewhere(folder: Path) -> str:
    free = free_folder(folder)
    return f"to adapt in a new folder: {same_command(output=free, python=f'output={free!r}')}"


def _new_recipe(
    make: Callable[[Wishes], Recipe],
    images: ImageSummary,
    options: AdaptOptions,
    seconds_at_end: Callable[[int], float],
    left: float,
) -> Recipe:
    """The recipe, with as many epochs as fit in the seconds that are left, with judging at the end.

    ``seconds_at_end`` gives what judging takes for a number of points.
    """
    wishes, begin = options.wishes, time.monotonic()
    recipe = make(wishes)
    if wishes.epochs:
        return recipe
    options.log_message("measuring a step")
    epoch = profile(recipe, MEASURED_SECONDS).step * (images.count // recipe.train.batch_size)
    left -= time.monotonic() - begin
    epochs, judging_seconds = fitting_epochs(epoch, seconds_at_end, left)
    length = f"{pluralize(epochs, 'epoch')} of {format_duration(epoch)}"
    judging = f"then {format_duration(judging_seconds)} for judging"
    if epochs * epoch + judging_seconds > left:
        options.log_message(f"{length}, {judging}: the least, and more than is left of --hours {options.hours:g}")
    else:
        options.log_message(f"{length}, {judging} (--hours {options.hours:g}, at most {MAX_EPOCHS} epochs)")
    return make(replace(wishes, epochs=epochs))


def _stated(recipe: Recipe) -> str:
    changed = recipe.adapt.model_dump(exclude_defaults=True)
    return ", ".join(f"{key} = {value}" for key, value in changed.items()) or "nothing"
