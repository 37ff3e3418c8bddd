"""Make the plan of a run: look at the images and the machine, apply the rules, and measure a step."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.doctor.findings import LogMessage
from sslkit.plan import rules
from sslkit.plan.draft import Choice, Draft
from sslkit.plan.facts import Facts, gather_facts
from sslkit.profiling.step_profile import profile
from sslkit.recipe.resolve import Recipe, build_recipe
from sslkit.text import format_duration

DEFAULT_HOURS = 1.0
MEASURED_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, and why it is as it is.

    Attributes:
        recipe: What to train.
        choices: Every value that the plan chose; the others were stated or are the paper's.
        facts: One line about images, machine and time.
        seconds: Expected duration of the run.
        hints: Sentences on what would be better than this plan.
    """

    recipe: Recipe
    choices: tuple[Choice, ...]
    facts: str
    seconds: float
    hints: tuple[str, ...]

    def lines(self) -> list[str]:
        """The plan as text: each value with its reason, the expected end, and what would be better."""
        words = {choice.key: f"{choice.key} = {json.dumps(choice.value)}" for choice in self.choices}
        width = min(max(map(len, words.values()), default=0), 44)
        end = datetime.now().astimezone() + timedelta(seconds=self.seconds)
        return [
            f"plan for {self.facts}",
            *(f"  {words[choice.key]:<{width}}  {choice.reason}" for choice in self.choices),
            f"expected: {format_duration(self.seconds)}, until about {end:%H:%M}; --set KEY=VALUE changes a value, "
            "--hours the length",
            *self.hints,
        ]


def make_plan(
    stated: Mapping[str, Mapping[str, Any]],
    hours: float = DEFAULT_HOURS,
    log_message: LogMessage = lambda _message: None,
) -> Plan:
    """Plan a run on the images of ``[data]``.

    Args:
        stated: Tables of a recipe with what the user stated, at least ``[data] path``. It is never changed.
        hours: Time for the run.
        log_message: Called with a line of text before each stage that takes time.

    Raises:
        UserError: The images cannot be used, are too few, or a stated value is wrong.
    """
    draft = Draft(stated)
    source = open_source(DataConfig.model_validate(stated["data"]))
    log_message(f"looking at {source.description}")
    facts = gather_facts(source, hours)
    for rule in (rules.choose_model, rules.choose_views, rules.choose_batch, rules.choose_optimizer):
        rule(draft, facts)
    log_message(f"measuring a step of {draft.get('method.name')} on {draft.get('backbone.name')}")
    seconds = _seconds_per_step(draft, facts)
    rules.choose_length(draft, facts, seconds)
    rules.choose_options(draft, facts)
    rules.choose_monitor(draft, facts)
    recipe = build_recipe(draft.tables, name="plan")
    steps = recipe.train.epochs * (len(source) // recipe.train.batch_size)
    hints = tuple(rules.hints(draft, facts))
    return Plan(recipe, tuple(draft.choices.values()), facts.describe(), steps * seconds, hints)


def _seconds_per_step(draft: Draft, facts: Facts) -> float:
    """Measure a step of a recipe with these values; its length does not matter."""
    trial = deepcopy(draft)
    trial.choose("train.epochs", 1, "")
    trial.choose("schedule.warmup_epochs", 0, "")
    rules.choose_options(trial, facts)
    return profile(build_recipe(trial.tables, name="plan"), MEASURED_SECONDS).step
