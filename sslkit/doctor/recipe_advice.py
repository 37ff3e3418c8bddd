"""What the recipe's numbers say beside each other and beside the data: advice, in plain words.

Thresholds are wide: what a paper or a shipped recipe does is never advised against.
"""

import math

from sslkit.doctor.findings import Finding, ok, warning
from sslkit.doctor.image_checks import ImageFacts, advise_on_views
from sslkit.methods import find_method
from sslkit.parts.backbone import family
from sslkit.recipe.resolve import Recipe

QUEUE, MOMENTUM, RATE, DECAY = "queue length", "momentum", "learning rate", "weight decay"
BATCH, TEMPERATURE, SCHEDULE, SAVING = "batch size", "temperature", "schedule", "saving"

# Peak rates beyond which an optimizer that is not the paper's is out of its usual range.
USUAL_RATES = {
    "sgd": (1e-3, 5.0),
    "lars": (1e-2, 20.0),
    "lars_simclr": (1e-2, 20.0),
    "larc": (1e-2, 20.0),
    "adamw": (1e-5, 1e-2),
    "lamb": (1e-4, 5e-2),
}
SAFE_ADAMW = 2e-3  # small networks take this at any batch
LARGEST_DECAY = {"sgd": 5e-3, "lars": 1e-3, "lars_simclr": 1e-3, "larc": 1e-3, "adamw": 0.5, "lamb": 0.5}
FEW, FEW_OF_A_GROUP, MANY, FEW_UPDATES = 32, 8, 1024, 200


def advise(recipe: Recipe, facts: ImageFacts) -> list[Finding]:
    """All advice that needs no computing."""
    steps = max(facts.count // recipe.train.batch_size, 1)
    found = [
        _queue_length(recipe, facts.count),
        _momentum(recipe, steps),
        _temperature(recipe),
        _batch_size(recipe),
        _learning_rate(recipe),
        _weight_decay(recipe),
        _schedule(recipe, steps),
        _saving(recipe),
    ]
    return [finding for finding in found if finding is not None] + advise_on_views(recipe.views, facts)


def _option(recipe: Recipe, key: str) -> float | None:
    """A number of `[method]`, if the method has it."""
    value = getattr(recipe.method, key, None)
    return float(value) if isinstance(value, int | float) else None


def _queue_length(recipe: Recipe, images: int) -> Finding | None:
    queue, negatives = _option(recipe, "queue_size"), _option(recipe, "negatives")
    if not queue and not negatives:
        return None
    if queue:
        held = queue / 2 if _option(recipe, "symmetric") else queue
        if held >= images:
            return warning(
                QUEUE,
                f"[method] queue_size = {queue:.0f} holds {held / images:.1f} epochs of the {images} images: every "
                f"image meets older keys of itself as negatives; take {images // 4} or fewer",
            )
        if held < recipe.train.batch_size:
            return warning(
                QUEUE,
                f"[method] queue_size = {queue:.0f} does not hold the keys of a batch of {recipe.train.batch_size}; a "
                "queue is there to have more negatives than a batch",
            )
        return ok(QUEUE, f"{queue:.0f} keys, {held / images:.0%} of the data")
    if negatives and negatives > images:
        return warning(
            QUEUE,
            f"[method] negatives = {negatives:.0f} are drawn from {images} memories: each is drawn several times, the "
            f"own one too; take {images // 4} or fewer",
        )
    return ok(QUEUE, f"{negatives:.0f} of {images} memories are drawn for a query")


def _momentum(recipe: Recipe, steps_per_epoch: int) -> Finding | None:
    momentum = _option(recipe, "momentum")
    if momentum is None:
        return None
    if momentum in (0.0, 1.0):
        what = "the teacher is the student of one step ago" if momentum == 0 else "the teacher never moves"
        return warning(MOMENTUM, f"[method] momentum = {momentum:g}: {what}; the papers take 0.99 to 0.999")
    half_life = math.log(0.5) / math.log(momentum)
    if momentum < 0.9:
        return warning(
            MOMENTUM,
            f"[method] momentum = {momentum:g}: half of the teacher is {half_life:.1f} steps old; with 0.9 MoCo "
            "already loses several points, the papers take 0.99 to 0.999",
        )
    total = recipe.train.epochs * steps_per_epoch
    warmup = recipe.schedule.warmup_epochs * steps_per_epoch
    limit, name = (warmup, "warm-up") if warmup else (total / 8, "first eighth of the run")
    said = f"half of the teacher is {half_life:.0f} steps old, the {name} {limit:.0f} steps long"
    if half_life > limit:
        fitting = max(0.5 ** (2 / limit), 0.9)
        return warning(
            MOMENTUM,
            f"{said}: the teacher remembers random weights when the learning rate is at its height; take [method] "
            f"momentum = {fitting:.2g} or longer epochs",
        )
    return ok(MOMENTUM, said)


def _temperature(recipe: Recipe) -> Finding | None:
    temperature = _option(recipe, "temperature")
    if temperature is None:
        return None
    if not 0.04 <= temperature <= 1.0:
        effect = "only the nearest negatives count" if temperature < 0.04 else "all similarities look alike"
        return warning(
            TEMPERATURE, f"[method] temperature = {temperature:g}: {effect}; the papers' lie between 0.07 and 1"
        )
    return ok(TEMPERATURE, f"{temperature:g}, within the papers' range")


def _batch_size(recipe: Recipe) -> Finding:
    batch, groups = recipe.train.batch_size, _option(recipe, "bn_groups") or 1
    prototypes, queue = _option(recipe, "prototypes"), _option(recipe, "queue_size") or 0
    if batch / groups < FEW_OF_A_GROUP:
        return warning(
            BATCH,
            f"{batch} images in {groups:.0f} BN groups are {batch / groups:g} a group, too few for batch statistics; "
            f"take [method] bn_groups = {max(batch // (4 * FEW_OF_A_GROUP), 2)} or a larger batch",
        )
    if prototypes and batch + queue < prototypes:
        return warning(
            BATCH,
            f"{batch} images (and {queue:.0f} queued) are shared out among {prototypes:.0f} prototypes, less than one "
            "each: the codes are noise; take fewer prototypes, a larger batch or a queue",
        )
    method = find_method(recipe.method_name)
    least = method.smallest_batch
    if batch < least:
        why = "its negatives are the batch" if method.negatives == "batch" else f"its paper goes to {least}"
        return warning(
            BATCH,
            f"{batch} is small for {recipe.method_name}: {why}. Take {least} or more "
            "([train] micro_batch saves memory), or a method with a queue, such as moco_v2",
        )
    if batch < FEW:
        return warning(BATCH, f"{batch} images a batch is few for any method here; take {FEW} or more")
    return ok(BATCH, f"{batch}" + (f", {batch / groups:g} in a BN group" if groups > 1 else ""))


def _learning_rate(recipe: Recipe) -> Finding:
    paper = find_method(recipe.method_name).paper_defaults(family(recipe.backbone.name))
    optim, peak, batch = paper.get("optim", {}), recipe.peak_lr, recipe.train.batch_size
    if optim.get("name") != recipe.optim.name or "lr" not in optim:
        return _usual_rate(recipe)
    linear = optim.get("lr_rule", "linear") != "none"
    by_rule = optim["lr"] * batch / (256 if linear else paper.get("train", {}).get("batch_size", batch))
    rule = (
        f"the paper's {optim['lr']:g} at batch {256 if linear else paper['train']['batch_size']}, linear in the batch"
    )
    ratio = peak / by_rule
    unscaled = linear and recipe.optim.lr_rule == "none" and recipe.optim.lr == optim["lr"] and not 0.6 < ratio < 1.7
    too_high = ratio > 5 and not (recipe.optim.name == "adamw" and peak <= SAFE_ADAMW)
    lowest = 0.01 if recipe.backbone.pretrained else 0.2  # weights that are continued want a gentle rate
    if unscaled or too_high or ratio < lowest or not peak:
        cure = "set [optim] lr_rule = 'linear'" if unscaled else "check [optim] lr and lr_rule"
        return warning(
            RATE, f"peak {peak:.3g} is {ratio:.3g} times what batch {batch} asks for: {by_rule:.3g} by {rule}; {cure}"
        )
    return ok(RATE, f"peak {peak:.3g}; {rule}: {by_rule:.3g}")


def _usual_rate(recipe: Recipe) -> Finding:
    """Where the paper has no rate for this optimizer."""
    name, peak = recipe.optim.name, recipe.peak_lr
    lowest, highest = USUAL_RATES[name]
    if lowest <= peak <= highest:
        return ok(RATE, f"peak {peak:.3g}, usual for {name} (the paper has another optimizer)")
    return warning(RATE, f"peak {peak:.3g}: {name} usually learns between {lowest:g} and {highest:g}, see [optim] lr")


def _weight_decay(recipe: Recipe) -> Finding:
    decay, largest = recipe.optim.weight_decay, LARGEST_DECAY[recipe.optim.name]
    if decay > largest:
        return warning(
            DECAY, f"[optim] weight_decay = {decay:g} is more than {recipe.optim.name} bears, about {largest:g} at most"
        )
    return ok(DECAY, f"{decay:g}")


def _schedule(recipe: Recipe, steps_per_epoch: int) -> Finding:
    schedule, epochs = recipe.schedule, recipe.train.epochs
    total = epochs * steps_per_epoch
    late = [milestone for milestone in schedule.milestones if milestone >= epochs]
    if schedule.decay == "steps" and late:
        words = ", ".join(f"{milestone:g}" for milestone in late)
        return warning(SCHEDULE, f"[schedule] milestones: {words} lie beyond the {epochs} epochs and are never reached")
    if recipe.train.head_warmup_epochs >= epochs:
        return warning(SCHEDULE, f"[train] head_warmup_epochs takes all {epochs} epochs: the backbone never learns")
    if schedule.warmup_epochs > epochs / 3:
        return warning(
            SCHEDULE,
            f"{schedule.warmup_epochs:g} of {epochs} epochs are warm-up; in the papers it is a seventh or less",
        )
    if not schedule.warmup_epochs and recipe.train.batch_size >= MANY and recipe.optim.name not in ("sgd", "larc"):
        return warning(
            SCHEDULE, f"no warm-up at batch {recipe.train.batch_size}: {recipe.optim.name} may break at the first steps"
        )
    if (_option(recipe, "freeze_prototypes_steps") or 0) > total / 2:
        return warning(SCHEDULE, f"the prototypes stay frozen for more than half of the {total} steps")
    if _option(recipe, "queue_size") and (_option(recipe, "queue_start_epoch") or 0) >= epochs:
        return warning(SCHEDULE, f"[method] queue_start_epoch lies beyond the {epochs} epochs: the queue is never used")
    if total < FEW_UPDATES:
        return warning(SCHEDULE, f"{total} updates in all: few encoders learn anything in so few; more [train] epochs")
    return ok(SCHEDULE, f"{total} updates, {schedule.warmup_epochs * steps_per_epoch:.0f} of them warm-up")


def _saving(recipe: Recipe) -> Finding:
    every = recipe.checkpoint
    if not every.every_steps and not every.every_minutes:
        return warning(SAVING, "[checkpoint] saves at the end only: a run that is stopped starts again from nothing")
    rhythm = f"every {every.every_minutes:g} minutes" if every.every_minutes else f"every {every.every_steps} steps"
    return ok(SAVING, rhythm)
