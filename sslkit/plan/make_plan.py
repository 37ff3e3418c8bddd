"""Make the plan of a run: look at the images and the machine, apply the rules, and measure a step."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import torch

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.distributed.collectives import max_over_processes
from sslkit.doctor.findings import LogMessage
from sslkit.engine.resilience.out_of_memory import OutOfMemoryError
from sslkit.engine.runtime.precision import training_device
from sslkit.engine.setup import steps_per_epoch
from sslkit.errors import UserError
from sslkit.plan import rules
from sslkit.plan.draft import Choice, Draft
from sslkit.plan.facts import Facts, gather_facts
from sslkit.profiling.step_profile import profile
from sslkit.recipe.resolve import Recipe, build_recipe, check_stated
from sslkit.text import format_duration

DEFAULT_HOURS = 1.0
MEASURED_SECONDS = 10.0
LEAST_BATCH = 8  # tried where memory is short


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, and why it is as it is."""

    recipe: Recipe
    choices: tuple[Choice, ...]  # every value that the plan chose; the others were stated or are the paper's
    stated: tuple[str, ...]  # every ``table.key`` that was stated, and kept
    facts: tuple[str, ...]  # lines about images, machine and time
    seconds: float  # expected duration of the run
    hints: tuple[str, ...]  # sentences on what would be better than this plan

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The plan as text: each value with its reason, the expected end, and what would be better."""
        words = {choice.key: f"{choice.key} = {json.dumps(choice.value)}" for choice in self.choices}
        width = min(max(map(len, words.values()), default=0), 40)
        end = datetime.now().astimezone() + timedelta(seconds=self.seconds)
        when = f"{end:%H:%M}" if self.seconds < 12 * 3600 else f"{end:%A %H:%M}"
        kept = [f"  stated: {', '.join(self.stated)}"] if self.stated else []
        return [
            *self.facts,
            "plan (--set KEY=VALUE changes a value):",
            *kept,
            *(f"  {words[choice.key]:<{width}}  {choice.reason}" for choice in self.choices),
            *([f"expected end: {when}, in {format_duration(self.seconds)}"] if self.seconds else []),
            *(f"note: {hint}" for hint in self.hints),
        ]


def make_plan(
    stated: Mapping[str, Mapping[str, Any]],
    hours: float | None = DEFAULT_HOURS,
    log_message: LogMessage = lambda _message: None,
) -> Plan:
    """Plan a run on the images of ``[data]``. All processes call it together.

    Args:
        stated: Tables of a recipe with what the user stated, at least ``[data] path``. It is never changed.
        hours: Time for the run. Without it, or if ``[train] max_steps`` is stated, no step is measured.
        log_message: Called with a line of text before what takes time.

    Raises:
        UserError: The images cannot be used, are too few, or a stated value is wrong.
    """
    check_stated(stated, "command line")
    draft = Draft(stated)
    channels = draft.get("backbone.args", {}).get("in_chans", 3)
    draft.tables["data"] = {**({"channels": channels} if channels != 3 else {}), **draft.tables["data"]}
    source = open_source(DataConfig.model_validate(draft.tables["data"]))
    facts = gather_facts(source, hours or DEFAULT_HOURS)
    for rule in (rules.choose_model, rules.choose_views, rules.choose_batch, rules.choose_optimizer):
        rule(draft, facts)
    steps_per_epoch(_trial_recipe(draft, facts), source)  # mistakes in what is stated are raised here
    seconds = 0.0
    if hours is not None and not draft.get("train.max_steps"):
        seconds = _seconds_per_step(draft, facts, log_message)
    rules.choose_length(draft, facts, seconds)
    rules.choose_options(draft, facts)
    rules.choose_monitor(draft, facts)
    recipe = build_recipe(draft.tables, name="command line")
    steps = recipe.train.epochs * rules.steps_per_epoch(draft, facts)
    return Plan(
        recipe,
        tuple(draft.choices.values()),
        tuple(sorted(draft.stated)),
        tuple(facts.lines()),
        steps * seconds / rules.TRAINING_SHARE,
        tuple(rules.hints(draft, facts, seconds)),
    )


def _seconds_per_step(draft: Draft, facts: Facts, log_message: LogMessage) -> float:
    """Measure a step; where the device's memory does not suffice, reduce the batch until it does."""
    message = f"measuring a step of {draft.get('method.name')} on {draft.get('backbone.name')}"
    while True:
        try:
            recipe = _trial_recipe(draft, facts)
            measured = profile(recipe, MEASURED_SECONDS, leave=False, on_start=partial(log_message, message))
            break
        except (torch.OutOfMemoryError, OutOfMemoryError):
            old = draft.get("train.batch_size")
            size = old // 2 // facts.processes * facts.processes
            if "train.batch_size" in draft.stated or size < LEAST_BATCH:
                raise UserError(
                    f"a batch of {old} views of {draft.get('views.size')} pixels does not fit in the memory of "
                    f"this device: --set train.batch_size={max(size, 2 * facts.processes)}, or a smaller --backbone"
                ) from None
            torch.cuda.empty_cache()
            draft.choose("train.batch_size", size, "what fits in the memory of this device")
            rules.choose_optimizer(draft, facts)
    return float(max_over_processes(torch.tensor(measured.step, device=training_device())))


def _trial_recipe(draft: Draft, facts: Facts) -> Recipe:
    """A recipe with the values that were chosen so far; its length does not matter to the time of a step."""
    trial = deepcopy(draft)
    longest = max(draft.get("schedule.warmup_epochs", 0), *draft.get("schedule.milestones", []), 0)
    trial.choose("train.epochs", int(longest) + 1, "")
    trial.choose("schedule.warmup_epochs", 0.1, "")
    if draft.get("schedule.decay") == "steps":
        trial.choose("schedule.milestones", [0.5], "")
    rules.choose_options(trial, facts)
    rules.choose_monitor(trial, facts)
    return build_recipe(trial.tables, name="command line")
