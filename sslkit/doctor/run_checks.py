"""The whole examination of a recipe, from the images to the advice."""

import os

from sslkit.data.sources.image_source import open_source
from sslkit.doctor.cost_forecast import (
    LOADING,
    MEMORY,
    check_precision,
    check_slices,
    check_threads,
    forecast_memory,
    weigh_loading,
)
from sslkit.doctor.findings import Finding, Report, Say, attempt
from sslkit.doctor.image_checks import check_alpha, check_pixels, look_at
from sslkit.doctor.method_checks import examine_wiring
from sslkit.doctor.process_checks import check_processes, launched, not_launched
from sslkit.doctor.recipe_advice import advise
from sslkit.doctor.view_checks import check_views
from sslkit.engine.batch_checks import steps_per_epoch
from sslkit.recipe.resolve import Recipe


def _quiet(_sentence: str) -> None:
    """Say nothing."""


def examine(recipe: Recipe, say: Say = _quiet) -> Report:
    """Build the recipe's method on its own data, check the wiring, and advise.

    Under a launcher every process takes part in the check that needs all of them; the rest is the first one's, and
    the others report nothing.

    Args:
        recipe: What `load_recipe` returned.
        say: Called with a line for each stage that takes its time.

    Raises:
        UserError: The recipe, the data or the machine cannot be used at all, for a reason that one sentence tells.
    """
    source = open_source(recipe.data).without_labels()
    steps_per_epoch(recipe, source)
    agreement = not_launched()
    if launched() > 1:
        agreement = check_processes(recipe, source)
        if int(os.environ.get("RANK", "0")):
            return Report([])
    say(f"looking at {len(source)} images of {source.description} and the views cut from them")
    facts = look_at(source)
    views = check_views(recipe, source)
    wiring, patient, seen = examine_wiring(recipe, source, say)
    measured: list[Finding] = []
    if patient is not None and seen is not None:
        patient_, seen_ = patient, seen
        measured = [
            check_pixels(patient.prepare(patient.views[0])),
            check_slices(patient),
            attempt(MEMORY, lambda: forecast_memory(patient_, seen_)),
            attempt(LOADING, lambda: weigh_loading(patient_, source, seen_)),
        ]
    say("weighing the recipe's numbers")
    on_machine = [check_threads(recipe), check_precision(recipe)]
    return Report([*wiring, agreement, *views, check_alpha(source), *advise(recipe, facts), *measured, *on_machine])
