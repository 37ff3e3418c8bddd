"""Advice about the recipe's settings: compared with each other, with the data, and with the paper.

The limits are wide: nothing that a paper or a shipped recipe does gets a warning.
"""

import math
from dataclasses import replace

from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.findings import Check, Finding, Report
from sslkit.doctor.image_checks import COPIES, ImageSummary, check_view_settings, summarise_images
from sslkit.errors import UserError
from sslkit.methods import Method, MomentumOptions, Progress
from sslkit.methods.method_options import power_of_two
from sslkit.parts.backbone import family, patch_size, whole_patches
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.schedules import momentum_text
from sslkit.recipe.resolve import Recipe

QUEUE, MOMENTUM, TEMPERATURE, OPTIONS = map(Check, ("queue length", "momentum", "temperature", "method options"))
BATCH, RATE, DECAY = map(Check, ("batch size", "learning rate", "weight decay"))
SCHEDULE, SAVING, SLICES, PATCHES = map(Check, ("schedule", "saving", "slices", "patches"))

# Peak rates outside of which an optimizer that is not the paper's is unlikely to work.
USUAL_RATES = {"sgd": (1e-3, 5.0), "adamw": (1e-5, 1e-2), "lamb": (1e-4, 5e-2)}
USUAL_RATES |= dict.fromkeys(("lars", "lars_simclr", "larc"), (1e-2, 20.0))
SAFE_ADAMW = 2e-3  # works for small networks at any batch size
MAX_DECAY = {"sgd": 5e-3, "lars": 1e-3, "lars_simclr": 1e-3, "larc": 1e-3, "adamw": 0.5, "lamb": 0.5}
MOMENTA = (0.9, 0.95, 0.97, 0.98, 0.99, 0.996, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
MIN_BATCH, MIN_GROUP, LARGE_BATCH, MIN_UPDATES = 32, 8, 1024, 200
SMALL_SET = 100_000  # images, up to which more updates are preferred to the paper's batch: docs/plan.md


def check_settings(recipe: Recipe, method: Method, images: ImageSummary) -> list[Finding]:
    """All advice that needs no computation. The weights of ``method`` do not matter."""
    steps_per_epoch = max(images.count // recipe.train.batch_size, 1)
    start = Progress(0, recipe.train.epochs * steps_per_epoch, steps_per_epoch, recipe.train.batch_size)
    found = [
        _queue_length(recipe, method, images.different),
        _momentum(recipe, method, start),
        _temperature(recipe, method),
        *(OPTIONS.warning(sentence) for sentence in method.advise(start)),
        _batch_size(recipe, method, images.count),
        _learning_rate(recipe, method),
        _weight_decay(recipe),
        _schedule(recipe, start),
        _saving(recipe),
        _slices(recipe, method),
        _patches(recipe, method),
    ]
    of_views = check_view_settings(recipe.views, images, patch_size(method.backbone))
    return [finding for finding in found if finding is not None] + of_views


def advise_at_start(recipe: Recipe, method: Method, source: ImageSource) -> list[str]:
    """The warnings of `check_settings`, as messages for the start of a run."""
    try:
        found = check_settings(recipe, method, summarise_images(source))
    except UserError:
        return []  # of images that cannot be read the run itself says more
    report = Report([finding for finding in found if finding.check != COPIES])  # of copies too
    messages = [f"WARNING: {each.check}: {each.sentence}" for each in [*report.of("fault"), *report.of("warning")]]
    return [*messages, report.settings_line()] if messages and report.settings() else messages


def _queue_length(recipe: Recipe, method: Method, images: int) -> Finding | None:
    batch_size = recipe.train.batch_size
    fitting = max(power_of_two(images / 4), batch_size if method.negatives == "queue" else 1)
    if method.negatives == "queue":
        held = method.updates_to_fill_queue(batch_size) * batch_size  # both views of an image may be queued
        rows = min(len(part.state_dict()["keys"]) for part in method.dictionaries().values())
        if rows == batch_size:
            return QUEUE.ok(f"the queue holds one batch of {rows} keys, the smallest queue there is")
        if held >= images:
            return QUEUE.warning(
                f"the queue holds {held / images:.1f} epochs of the {images} images, so older keys of an image are its "
                f"own negatives: set method.queue_size = {fitting}"
            )
        if rows < batch_size:
            return QUEUE.warning(
                f"the queue has fewer keys than a batch of {batch_size} images, but should give more negatives: set "
                f"method.queue_size = {min(power_of_two(16 * batch_size), fitting)}"
            )
        return QUEUE.ok(f"the queue holds keys of {held / images:.0%} of the images")
    chance = method.chance_loss(batch_size)
    if method.negatives != "bank" or chance is None or chance.negatives is None:
        return None
    drawn = chance.negatives.count
    if drawn > images:
        return QUEUE.warning(
            f"{drawn} negatives are drawn from a memory bank of {images} images, so each is drawn several times, the "
            f"image itself too: set method.negatives = {fitting}"
        )
    return QUEUE.ok(f"{drawn} negatives are drawn from a memory bank of {images} images")


def _momentum(recipe: Recipe, method: Method, start: Progress) -> Finding | None:
    teacher = next(iter(method.teachers().values()), None)
    if teacher is None:
        return None
    momentum = teacher.momentum_at(start)
    warmup = recipe.schedule.warmup_epochs * start.updates_per_epoch
    limit = warmup or start.total_updates / 8
    fitting = max((each for each in MOMENTA if each <= 0.5 ** (2 / limit)), default=MOMENTA[0])
    cure = f"set method.momentum = {fitting:g}"
    if isinstance(recipe.method, MomentumOptions) and recipe.method.momentum_half_life is not None:
        cure = f"set method.momentum_half_life = {power_of_two(limit * start.batch_size / 2)}"
    if momentum == 1.0:
        return MOMENTUM.warning(f"the teacher never moves (momentum 1): {cure}, unless you distil a fixed teacher")
    if momentum < 0.9:
        what = "equals the student of the previous step" if momentum == 0 else "follows the student too fast"
        return MOMENTUM.warning(f"the teacher {what} (momentum {momentum:.3g}); the papers use 0.99 to 0.999: {cure}")
    half_life = math.log(0.5) / math.log(momentum)
    if half_life > limit and start.total_updates >= MIN_UPDATES:  # a shorter run has one warning, of its schedule
        until = f"the warm-up of {warmup:.0f}" if warmup else f"an eighth of the run, {limit:.0f}"
        return MOMENTUM.warning(
            f"the teacher updates too slowly for this short run ({start.total_updates} steps): half of its random "
            f"initial weights remain after {half_life:.0f} steps, longer than {until} steps; {cure}"
        )
    return MOMENTUM.ok(f"{momentum_text(momentum)}: the teacher's weights have a half-life of {half_life:.0f} steps")


def _temperature(recipe: Recipe, method: Method) -> Finding | None:
    chance = method.chance_loss(recipe.train.batch_size)
    if chance is None or chance.negatives is None:
        return None
    if not 0.04 <= chance.temperature <= 1.0:
        what = "only the nearest negatives count" if chance.temperature < 0.04 else "all negatives count alike"
        return TEMPERATURE.warning(f"at {chance.temperature:g} {what}: set method.temperature = 0.1")
    return TEMPERATURE.ok(f"{chance.temperature:g}, as in the papers")


def _batch_size(recipe: Recipe, method: Method, num_images: int) -> Finding:
    batch_size, groups, smallest = recipe.train.batch_size, method.bn_groups, method.smallest_batch
    if groups > 1 and batch_size / groups < MIN_GROUP:
        few = f"{batch_size / groups:g} images in each of {groups} BatchNorm groups are too few for batch statistics"
        fitting = [each for each in range(2, groups) if batch_size % each == 0 and batch_size / each >= MIN_GROUP]
        if fitting:
            return BATCH.warning(f"{few}: set method.bn_groups = {fitting[-1]} or a larger train.batch_size")
        if MIN_GROUP * groups <= num_images:
            return BATCH.warning(f"{few}: set train.batch_size = {MIN_GROUP * groups}")
        return BATCH.warning(f"{few}; more images would allow a larger batch")
    if batch_size < smallest and num_images > SMALL_SET:
        few = f"{batch_size} is small for {recipe.method_name}, whose paper goes down to {smallest}"
        return BATCH.warning(
            f"{few}: set train.batch_size = {smallest} (with train.micro_batch if memory is short), or use a queue, as "
            "in moco_v2"
        )
    if batch_size < MIN_BATCH:
        few = f"{batch_size} is small for any method"
        if num_images < MIN_BATCH:
            return BATCH.warning(f"{few}; more images would allow a larger batch")
        return BATCH.warning(f"{few}: set train.batch_size = {MIN_BATCH} or more")
    if batch_size < smallest:
        return BATCH.ok(
            f"{batch_size}, below the {smallest} of {recipe.method_name}'s paper, for more updates: see docs/plan.md"
        )
    return BATCH.ok(f"{batch_size}" + (f", {batch_size / groups:g} in each BatchNorm group" if groups > 1 else ""))


def _learning_rate(recipe: Recipe, method: Method) -> Finding:
    paper = method.paper_defaults(family(recipe.backbone.name))
    optim, peak, batch_size = paper.get("optim", {}), recipe.peak_lr, recipe.train.batch_size
    name = recipe.optim.name
    if optim.get("name") != name or "lr" not in optim:
        lowest, highest = USUAL_RATES[name]
        if lowest <= peak <= highest:
            return RATE.ok(f"peak {peak:.3g}, usual for {name} (the paper uses another optimizer)")
        return RATE.warning(
            f"a peak of {peak:.3g} is outside the usual range of {name}, {lowest:g} to {highest:g}: "
            + _rate_for(recipe, (lowest * highest) ** 0.5)
        )
    is_linear = optim.get("lr_rule", "linear") != "none"
    paper_batch = 256 if is_linear else paper.get("train", {}).get("batch_size", batch_size)
    expected = optim["lr"] * batch_size / paper_batch
    rule = f"the paper's {optim['lr']:g} at batch size {paper_batch}, scaled to {batch_size}"
    ratio = peak / expected
    unscaled = is_linear and recipe.optim.lr_rule == "none" and recipe.optim.lr == optim["lr"] and not 0.6 < ratio < 1.7
    is_high = ratio > 5 and not (name == "adamw" and peak <= SAFE_ADAMW)
    lowest = 0.01 if recipe.backbone.pretrained else 0.2  # continuing from trained weights needs a low rate
    if unscaled or is_high or ratio < lowest or not peak:
        cure = 'set optim.lr_rule = "linear"' if unscaled else _rate_for(recipe, expected)
        return RATE.warning(f"a peak of {peak:.3g} is {ratio:.3g} times {expected:.3g} ({rule}): {cure}")
    return RATE.ok(f"peak {peak:.3g}; the paper's rule gives {expected:.3g} ({rule})")


def _rate_for(recipe: Recipe, peak: float) -> str:
    """The advice to set the base rate that gives this peak."""
    unit = replace(recipe, optim=recipe.optim.model_copy(update={"lr": 1.0}))
    return f"set optim.lr = {peak / unit.peak_lr:.2g}, for a peak of about {peak:.2g}"


def _weight_decay(recipe: Recipe) -> Finding:
    decay, name = recipe.optim.weight_decay, recipe.optim.name
    if decay > MAX_DECAY[name]:
        return DECAY.warning(f"{decay:g} is too high for {name}: set optim.weight_decay = {MAX_DECAY[name] / 5:g}")
    return DECAY.ok(f"{decay:g}")


def _schedule(recipe: Recipe, start: Progress) -> Finding:
    schedule, epochs, total = recipe.schedule, recipe.train.epochs, start.total_updates
    late = [milestone for milestone in schedule.milestones if milestone >= epochs]
    if schedule.decay == "steps" and late:
        fitting = [round(epochs * share, 1) for share in (0.6, 0.8)]
        return SCHEDULE.warning(
            f"milestones {', '.join(f'{milestone:g}' for milestone in late)} are after the last of the {epochs} "
            f"epochs and have no effect: set schedule.milestones = {fitting}"
        )
    if recipe.train.head_warmup_epochs >= epochs:
        cure = f"set train.head_warmup_epochs = {epochs / 10:g}"
        return SCHEDULE.warning(f"the backbone is frozen in all {epochs} epochs and never learns: {cure}")
    usual = f"set schedule.warmup_epochs = {round(epochs / 10, 1):g}"
    if schedule.warmup_epochs > epochs / 3:
        return SCHEDULE.warning(f"{schedule.warmup_epochs:g} of {epochs} epochs are warm-up, a large part: {usual}")
    name, batch_size = recipe.optim.name, recipe.train.batch_size
    if not schedule.warmup_epochs and batch_size >= LARGE_BATCH and name not in ("sgd", "larc"):
        return SCHEDULE.warning(f"{name} may diverge without a warm-up at batch size {batch_size}: {usual}")
    if total < MIN_UPDATES:
        needed = math.ceil(MIN_UPDATES / start.updates_per_epoch)
        return SCHEDULE.warning(f"{total} updates are too few to learn much: set train.epochs = {needed} or more")
    return SCHEDULE.ok(f"{total} updates, {schedule.warmup_epochs * start.updates_per_epoch:.0f} of them warm-up")


def _saving(recipe: Recipe) -> Finding:
    rules = recipe.checkpoint
    if not rules.every_steps and not rules.every_minutes:
        return SAVING.warning("nothing is saved before the end of the run: set checkpoint.every_minutes = 30")
    every = f"{rules.every_minutes:g} minutes" if rules.every_minutes else f"{rules.every_steps} steps"
    return SAVING.ok(f"a checkpoint every {every}")


def _slices(recipe: Recipe, method: Method) -> Finding:
    """Slices have batch statistics of their own; without shuffled keys these identify the positive."""
    micro_batch = recipe.train.micro_batch
    if not micro_batch:
        return SLICES.ok("none: each process computes its batch at once")
    if not has_batch_norm(method.backbone):
        return SLICES.ok("exact: the backbone has no BatchNorm")
    if micro_batch < MIN_GROUP:
        return SLICES.warning(f"{micro_batch} images are too few for BatchNorm: set train.micro_batch = {MIN_GROUP}")
    if method.bn_groups > 1 and not method.shuffle_keys:
        return SLICES.warning(
            f"slices of {micro_batch} images have BatchNorm statistics of their own, which identify a positive among "
            "the negatives, as keys are not shuffled: set train.micro_batch = 0, or use a ViT, which has no BatchNorm"
        )
    return SLICES.ok(f"of {micro_batch} images, each with BatchNorm statistics of its own")


def _patches(recipe: Recipe, method: Method) -> Finding | None:
    """A ViT reads whole patches, and leaves the pixels at the right and the bottom out."""
    patch, views = patch_size(method.backbone), recipe.views
    if patch == 1:
        return None
    sizes = {"views.size": views.size}
    if views.local.count:
        sizes["views.local.size"] = views.policy_of("local").size
    for key, size in sizes.items():
        if size % patch:
            unseen = 1 - (size // patch * patch / size) ** 2
            return PATCHES.warning(
                f"views of {size} pixels are not a whole number of the backbone's patches of {patch}, so {unseen:.0%} "
                f"of their pixels are never seen: set {key} = {whole_patches(size, patch)}"
            )
    return PATCHES.ok(f"views are a whole number of patches of {patch} pixels")
