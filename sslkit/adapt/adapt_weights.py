"""Continue public weights on own images, judge the result, and hand back the better encoder."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslkit.adapt.adapt_recipe import Wishes, adaptation_recipe, input_sizes, look_at
from sslkit.adapt.adapted_points import Point, points_of, write_answer
from sslkit.adapt.answer import Answer
from sslkit.adapt.judging import Judge
from sslkit.adapt.start_weights import Start, read_start
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.doctor.image_checks import ImageSummary
from sslkit.engine.trainer import train
from sslkit.errors import UserError
from sslkit.profiling.step_profile import profile
from sslkit.recipe.resolve import Recipe, load_saved
from sslkit.text import format_duration

DEFAULT_HOURS, MEASURED_SECONDS = 1.0, 10.0
MAX_EPOCHS = 20
TRAINING_SHARE = 0.8  # of the time; the rest is for judging
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
    options = options or AdaptOptions()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sslkit adapt runs in 1 process; to train on several, set [adapt] in a recipe of pretrain")
    folder = Path(output)
    start, source = read_start(weights), open_source(data).without_labels()
    images = look_at(source, "--data")
    judge = Judge(source, options.labelled, options.retain, options.log_message)
    saved = _saved_recipe(folder, options.wishes)
    size = saved.views.size if saved else options.wishes.size
    sizes = input_sizes(start, images, size)
    size = judge.judge_start(start, sizes, fixed=bool(size))
    recipe = saved or _new_recipe(start, data, images, size, options)
    options.log_message(
        f"training: {recipe.method_name}, views of {size} px, batch {recipe.train.batch_size}, "
        f"{recipe.train.epochs} epochs, [adapt] {_stated(recipe)}"
    )
    run = train(recipe, folder / "run")
    if run.stopped:
        return AdaptResult(folder, None, run.stopped)
    points = points_of(run.folder, recipe, judge.start_at(size))
    answer, chosen = judge.judge_end(points, size)
    return _finish(folder, answer, chosen, points, judge)


def _finish(folder: Path, answer: Answer, chosen: Point, points: list[Point], judge: Judge) -> AdaptResult:
    encoder = chosen.encoder if answer.gained else judge.start_at(answer.size)
    write_answer(folder, encoder, answer, chosen.step, judge.description)
    return AdaptResult(folder, answer)


def _saved_recipe(folder: Path, wishes: Wishes) -> Recipe | None:
    """The recipe of the adaptation that a folder holds; None if it holds none.

    Raises:
        UserError: The folder holds something else, or an adaptation with other settings.
    """
    file = folder / "run" / "recipe.toml"
    if not file.is_file():
        if folder.exists() and any(entry.name != "run" for entry in folder.iterdir()):
            raise UserError(f"--output {folder}: is not empty and holds no adaptation; name a new folder")
        return None
    recipe = load_saved(file)
    for option, wished, found in (
        ("--size", wishes.size, recipe.views.size),
        ("--epochs", wishes.epochs, recipe.train.epochs),
    ):
        if wished and wished != found:
            raise UserError(f"--output {folder}: holds an adaptation with {option} {found}; name another folder")
    return recipe


def _new_recipe(start: Start, data: DataConfig, images: ImageSummary, size: int, options: AdaptOptions) -> Recipe:
    """The recipe, with as many epochs as fit in the time."""
    table: dict[str, Any] = data.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    wishes = options.wishes
    recipe = adaptation_recipe(start, table, images, size, wishes)
    if wishes.epochs:
        return recipe
    options.log_message("measuring a step")
    seconds = profile(recipe, MEASURED_SECONDS).step * (images.count // recipe.train.batch_size)
    fitting = math.floor(TRAINING_SHARE * 3600 * options.hours / seconds)
    epochs = max(min(fitting, MAX_EPOCHS), 1)
    options.log_message(
        f"{epochs} epochs of {format_duration(seconds)} (--hours {options.hours:g}, at most {MAX_EPOCHS})"
    )
    return adaptation_recipe(start, table, images, size, Wishes(wishes.way, wishes.size, epochs, wishes.stated))


def _stated(recipe: Recipe) -> str:
    changed = recipe.adapt.model_dump(exclude_defaults=True)
    return ", ".join(f"{key} = {value}" for key, value in changed.items()) or "nothing"
