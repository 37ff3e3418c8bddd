"""All checks of a recipe, in order."""

import os
from dataclasses import replace

import torch

from sslkit.data.augment.cpu import normalise
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor.cost_forecast import check_precision, check_threads, forecast_memory, forecast_time
from sslkit.doctor.doctor_setup import launched_processes, num_processes, set_up_checks
from sslkit.doctor.findings import LOADING, MEMORY, Finding, LogMessage, Report, describe_error
from sslkit.doctor.image_checks import ImageSummary, check_alpha, check_pixels, count_copies, summarise_images
from sslkit.doctor.process_checks import NOT_LAUNCHED, check_processes
from sslkit.doctor.recipe_advice import check_settings
from sslkit.doctor.training_checks import CONTRACT, STEP, check_batch_norm_leak, check_training
from sslkit.doctor.view_checks import check_views
from sslkit.engine.setup import build_method, check_batch_split, steps_per_epoch
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe


def check_recipe(recipe: Recipe, log_message: LogMessage = lambda _message: None) -> Report:
    """Build the recipe's method, make a step on a few images of its data, and check the settings.

    Under a launcher all processes take part in the check ``processes agree``; the first one makes the others.

    Processes other than the first return no findings. ``log_message`` is called with a line of text before each stage.

    Raises:
        UserError: The recipe, the data or the machine cannot be used at all.
    """
    source = open_source(recipe.data).without_labels()
    steps_per_epoch(recipe, source)
    agreement = check_processes(recipe, source) if launched_processes() > 1 else NOT_LAUNCHED
    if os.environ.get("RANK", "0") != "0":
        return Report([])
    log_message(f"checking {len(source)} images of {source.description} and their views")
    copies, compared = count_copies(source)
    images = replace(summarise_images(source), copies=copies, compared=compared)
    of_data = [*check_views(recipe, source), check_alpha(source)]
    of_method = check_method(recipe, source, images, log_message)
    return Report([*of_method, agreement, *of_data, check_threads(recipe), check_precision(recipe)])


def check_method(
    recipe: Recipe, source: ImageSource, images: ImageSummary, log_message: LogMessage = lambda _message: None
) -> list[Finding]:
    """All checks that need the method; a UserError if the batch does not fit its BN groups or the processes."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            method = build_method(recipe, len(source))
    except UserError:
        raise
    except Exception as error:
        return [STEP.fault(f"the method cannot be built: {describe_error(error)}")]
    check_batch_split(recipe, method, num_processes(recipe))
    bn_groups = method.bn_groups
    setup = set_up_checks(recipe, source, method, log_message)
    of_step, record = check_training(setup)
    method.bn_groups = bn_groups  # the small batch had fewer
    if record is None or any(finding.check == CONTRACT and finding.verdict == "fault" for finding in of_step):
        return of_step
    log_message("forecasting memory and time")
    return [
        *of_step,
        check_batch_norm_leak(method),
        *check_settings(recipe, method, images),
        check_pixels(normalise(setup.views[0], recipe.views.mean, recipe.views.std)),
        MEMORY.attempt(lambda _: forecast_memory(setup, record)),
        LOADING.attempt(lambda _: forecast_time(setup, source, record)),
    ]
