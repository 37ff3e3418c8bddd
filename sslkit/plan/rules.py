"""The rules of the plan: each fills in some keys of a draft from the facts, with a reason a key.

The numbers come from the experiments in docs/plan.md (`benchmarks/plan_experiments.py`). What a method needs of its own
options is the method's to say: `Method.fitted_options`.
"""

import math
import shlex
from typing import Any

import timm

from sslkit.data.augment.policies import POLICIES
from sslkit.data.augment.view_layers import LOCAL_DEFAULTS
from sslkit.doctor.image_checks import SMALLEST_VIEW
from sslkit.doctor.recipe_advice import MIN_UPDATES, SMALL_SET
from sslkit.errors import UserError
from sslkit.methods import Progress, find_method
from sslkit.methods.method_options import Fitted, power_of_two
from sslkit.parts.backbone import family, whole_patches
from sslkit.plan.backbone_facts import look_at_backbone
from sslkit.plan.draft import Draft
from sslkit.plan.facts import Facts
from sslkit.recipe.schema import EVALUATIONS
from sslkit.text import format_duration, join, pluralize

VIEW_SIZES = (SMALLEST_VIEW, 96, 128, 160, 192, 224)
REDUCTION = 32  # the stride of a ResNet: from 64 pixels, 2 x 2 positions are left
LARGEST_ON_CPU = 96
PAPER_VIEW = 224  # pixels: the views of the papers
BLUR_PER_PIXEL = 2.0 / PAPER_VIEW  # the papers' largest blur
LOCAL_STEP = 8  # pixels: a size of local crops is a multiple of it
SMALLEST_BLURRED = 96  # of smaller views a blur to scale is less than a pixel wide
WEAK_JITTER, WEAK_GRAY = [0.2, 0.2, 0.2, 0.05], 0.05  # brightness, contrast, saturation, hue; probability of grey
BATCH_ON_CPU, BATCH_ON_GPU, LARGEST_BATCH = 64, 256, 1024
SMALLEST_BATCH = 32  # the doctor warns of smaller ones
STEPS_PER_EPOCH = 16  # an epoch has at least so many, where the images allow
RATES = {"resnet": 1e-3, "vit": 5e-4, "other": 1e-3}  # of AdamW, up to a batch of 256
PRETRAINED_RATE = 1e-4
# Of optimizers that a method's paper does not use: rate for a batch of 256, how it is scaled, weight decay, and whose.
OTHER_OPTIMIZERS = {
    "sgd": (0.03, "linear", 1e-4, "MoCo v1"),
    "lars": (0.2, "linear", 1.5e-6, "BYOL"),
    "lars_simclr": (0.3, "linear", 1e-6, "SimCLR"),
    "larc": (0.6, "linear", 1e-6, "SwAV"),
    "lamb": (1.8e-3, "sqrt", 0.02, "ResNet strikes back (arXiv:2110.00476)"),
}
FEW, MANY = 10_000, SMALL_SET  # images
MAX_EPOCHS = {FEW: 400, MANY: 300}
LONGEST, UNMEASURED_EPOCHS = 200, 100  # epochs: of more images; where the time of a step is not known
TRAINING_SHARE = 0.9  # of the time; the rest is for evaluations and checkpoints
WARMUP_SHARE, LONGEST_WARMUP_SHARE = 0.1, 1 / 3  # of the epochs: usual; the doctor warns of more
MILESTONE_SHARES = (0.6, 0.8)  # of the epochs: MoCo v1's 120 and 160 of 200
FEWEST_MONITORED = 50


def choose_model(draft: Draft, facts: Facts) -> None:
    """Method, backbone and precision."""
    draft.choose("method.name", "moco_v2", "its negatives come from a queue, so a small batch is enough")
    on_cpu = facts.device == "cpu"
    why = "small enough to train on a CPU" if on_cpu else "the usual size for a GPU"
    draft.choose("backbone.name", "resnet18" if on_cpu else "resnet50", why)
    if family(draft.get("backbone.name")) == "resnet" and not draft.get("backbone.pretrained"):
        draft.choose("backbone.zero_init_last", True, "each block begins as the identity")
    if facts.bf16:
        draft.choose("train.precision", "bf16", "this GPU computes in bf16 natively")


def choose_views(draft: Draft, facts: Facts) -> None:
    """Size, crops, colour and blur of the views. Everything in pixels is relative to the size."""
    draft.choose("views.policy", "moco_v2", "crops, colour, grey and mirroring, as in most papers")
    _choose_sizes(draft, facts)
    size = draft.get("views.size")
    asked = [draft.get(key) for key in draft.stated if key.startswith("views.") and key.endswith("blur_prob")]
    if size < SMALLEST_BLURRED and "views.blur_sigma" not in draft.stated and not any(asked):
        draft.choose("views.blur_prob", 0.0, f"a blur in proportion to views of {size} pixels changes nothing")
    elif any(asked) or not asked:  # not where the user has switched blur off
        sigma = [0.1, max(round(size * BLUR_PER_PIXEL, 2), 0.2)]
        draft.choose("views.blur_sigma", sigma, f"the paper's 2 pixels of {PAPER_VIEW}, for {size}")
    if facts.grey or facts.moments:
        kind = "have other channels than RGB" if facts.moments else "are grey"
        draft.choose("views.jitter", [*WEAK_JITTER[:2], 0.0, 0.0], f"the images {kind}: brightness and contrast only")
        draft.choose("views.gray_prob", 0.0, f"the images {kind}")
    elif facts.different <= MANY:
        draft.choose("views.jitter", WEAK_JITTER, "half the paper's changes, so that the encoder still learns colour")
        draft.choose("views.gray_prob", WEAK_GRAY, "a quarter of the paper's")
    if facts.moments:
        for key, values in zip(("views.mean", "views.std"), facts.moments, strict=True):
            draft.choose(key, values, "measured on a sample of the images")


def _choose_sizes(draft: Draft, facts: Facts) -> None:
    """Side of the views, and of local crops if there are any; a whole number of a ViT's patches."""
    fitting = [size for size in VIEW_SIZES if size <= max(facts.short_side, VIEW_SIZES[0])]
    size = min(fitting[-1], LARGEST_ON_CPU) if facts.device == "cpu" else fitting[-1]
    limited = f"; at most {LARGEST_ON_CPU} on a CPU" if size < fitting[-1] else ""
    if facts.short_side < size:
        limited = f": enlarged, because most networks reduce their input {REDUCTION} times"
    patch = look_at_backbone(draft).patch
    whole = whole_patches(size, patch)
    if whole != size:
        limited += f"; {whole} instead of {size}, a whole number of patches of {patch}"
    draft.choose("views.size", whole, f"the images have {facts.range_of_sides} pixels on the shorter side{limited}")
    of_policy = POLICIES.get(draft.get("views.policy"), {}).get("local", {}).get("count", 0)
    if draft.get("views.local.count", of_policy):
        paper, size = LOCAL_DEFAULTS["size"], draft.get("views.size")
        local = whole_patches(size * paper / PAPER_VIEW, patch if patch > 1 else LOCAL_STEP)
        draft.choose("views.local.size", local, f"the paper's {paper} beside {PAPER_VIEW}, for {size}")


def choose_batch(draft: Draft, facts: Facts) -> None:
    """Batch size, a multiple of the number of processes, of stated BatchNorm groups and of stated slices."""
    usual = BATCH_ON_CPU if facts.device == "cpu" else min(BATCH_ON_GPU * facts.processes, LARGEST_BATCH)
    usual = max(usual // facts.processes, 2) * facts.processes
    smallest = find_method(draft.get("method.name")).smallest_batch
    usual_why = "usual on this device"
    if facts.different > SMALL_SET and usual < smallest:
        usual = math.ceil(smallest / facts.processes) * facts.processes
        usual_why = f"the paper goes down to {smallest}"
    by_steps = power_of_two(max(facts.different / STEPS_PER_EPOCH, SMALLEST_BATCH))
    size = max(min(usual, by_steps, power_of_two(facts.count)) // facts.processes, 2) * facts.processes
    groups = max(draft.get("method.bn_groups", 1), 1) if look_at_backbone(draft).batch_norm else 1
    slices = max(draft.get("train.micro_batch", 0), 0)
    unit = math.lcm(facts.processes * max(slices, 1), groups)
    least = math.ceil(2 * max(facts.processes, groups) / unit) * unit  # two images in each part
    fitting = max(size // unit * unit, least)
    why = usual_why if size >= usual else f"so that an epoch has {pluralize(facts.count // size, 'step')}"
    if fitting != size:
        parts = [f"{groups} BatchNorm groups"] * (groups > 1) + [f"slices of {slices}"] * (slices > 1)
        why = f"divides into {join(parts)}"
    draft.choose("train.batch_size", fitting, why)


def choose_optimizer(draft: Draft, facts: Facts) -> None:
    """Optimizer, learning rate and decay. The paper's optimizer, if it is stated, keeps the paper's numbers."""
    draft.choose("optim.name", "adamw", "learns in few epochs, whatever the backbone")
    batch_size, kind, name = draft.get("train.batch_size"), family(draft.get("backbone.name")), draft.get("optim.name")
    paper = find_method(draft.get("method.name")).paper_defaults(kind).get("optim", {})
    if name in OTHER_OPTIMIZERS and (paper.get("name") != name or paper.get("lr_rule") == "none"):
        rate, rule, decay, origin = OTHER_OPTIMIZERS[name]
        draft.choose("optim.lr", rate, f"of {origin}, for a batch of 256")
        draft.choose("optim.lr_rule", rule, f"as in {origin}")
        draft.choose("optim.weight_decay", decay, f"as in {origin}")
        if name != "lamb":
            draft.choose("optim.momentum", 0.9, f"as in {origin}")
    elif name == "adamw":
        rate, why = RATES[kind], "of AdamW for a network from random weights"
        if draft.get("backbone.pretrained"):
            rate, why = PRETRAINED_RATE, "low, to keep what the pretrained weights know"
        peak = rate * math.sqrt(max(batch_size / BATCH_ON_GPU, 1.0))
        scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size / 256)}.get(draft.get("optim.lr_rule", ""), 1)
        if scale != 1:
            why = f"for a peak of {peak:.2g} with the {draft.get('optim.lr_rule')} rule at batch size {batch_size}"
        draft.choose("optim.lr", float(f"{peak / scale:.2g}"), why)
        draft.choose("optim.lr_rule", "none", "the rate is for this batch size")
        draft.choose("optim.weight_decay", 0.01, "PyTorch's default for AdamW")
        draft.choose("optim.betas", [0.9, 0.999], "PyTorch's default")
    if "schedule.milestones" in draft.stated:
        draft.choose("schedule.decay", "steps", "at the milestones that are stated")
    elif "schedule.decay" not in draft.stated:
        draft.choose("schedule.decay", "cosine", "needs no milestones")
        draft.choose("schedule.per", "step", "the run is short")


def choose_length(draft: Draft, facts: Facts, seconds_per_step: float) -> None:
    """Epochs, from the time there is; ``seconds_per_step`` is 0 if it was not measured."""
    affordable = (
        UNMEASURED_EPOCHS
        if not seconds_per_step
        else int(TRAINING_SHARE * facts.hours * 3600 / (seconds_per_step * steps_per_epoch(draft, facts)) + 1e-9)
    )
    most = _most_epochs(facts)
    epochs = min(max(affordable, 1), most)
    why = f"the most that is planned for {facts.count} images"
    if not seconds_per_step:
        why = "the time of a step was not measured"
    elif affordable < 1:
        why = f"one epoch, which takes longer than {format_duration(3600 * facts.hours)} (--hours)"
    elif epochs < most:
        why = f"what fits in {format_duration(3600 * facts.hours)} (--hours)"
    draft.choose("train.epochs", epochs, why)
    epochs = draft.get("train.epochs")
    draft.choose("schedule.warmup_epochs", round(epochs * WARMUP_SHARE, 2), f"{WARMUP_SHARE:.0%} of the run")
    if draft.get("schedule.decay") == "steps":
        milestones = [round(epochs * share, 2) for share in MILESTONE_SHARES]
        draft.choose("schedule.milestones", milestones, "60% and 80% of the run, as in MoCo v1")
    if draft.get("schedule.warmup_epochs") > epochs and "train.epochs" not in draft.stated:
        raise UserError(_warmup_does_not_fit(draft, facts, seconds_per_step))


def _warmup_does_not_fit(draft: Draft, facts: Facts, seconds_per_step: float) -> str:
    """Why a stated warm-up is too long, and how long a run fits it."""
    warmup, epochs = draft.get("schedule.warmup_epochs"), draft.get("train.epochs")
    fitting = math.ceil(warmup / LONGEST_WARMUP_SHARE)
    if seconds_per_step and fitting <= _most_epochs(facts):
        steps = fitting * steps_per_epoch(draft, facts)
        return (
            f"[schedule] warmup_epochs: {warmup:g} epochs of warm-up do not fit in {pluralize(epochs, 'epoch')}, all "
            f"that {format_duration(3600 * facts.hours)} (--hours) allow; {_hours_for(steps, seconds_per_step)} fits, "
            f"or --set schedule.warmup_epochs={round(epochs * WARMUP_SHARE, 2):g}"
        )
    return (
        f"[schedule] warmup_epochs: {warmup:g} epochs of warm-up do not fit in {pluralize(epochs, 'epoch')}; --set "
        f"train.epochs={fitting} fits"
    )


def _hours_for(steps: int, seconds_per_step: float) -> str:
    """The option ``--hours`` for a run of so many steps, rounded up."""
    return f"--hours {math.ceil(steps * seconds_per_step / TRAINING_SHARE / 36) / 100:g}"


def choose_options(draft: Draft, facts: Facts) -> None:
    """Options of the method that depend on the number of images and the length of the run."""
    epoch, batch_size = steps_per_epoch(draft, facts), draft.get("train.batch_size")
    start = Progress(0, draft.get("train.epochs") * epoch, epoch, batch_size)
    stated = {key.removeprefix("method."): draft.get(key) for key in draft.stated if key.startswith("method.")}
    fitted_options = find_method(draft.get("method.name")).fitted_options(facts.different, start, stated)
    for key, fitted in fitted_options.items():
        if key == "momentum_half_life" and draft.stated & {"method.momentum", "method.momentum_schedule"}:
            continue  # it would take their place
        if key == "bn_groups" and not look_at_backbone(draft).batch_norm:
            fitted = Fitted(1, "the backbone has no BatchNorm")
        draft.choose(f"method.{key}", fitted.value, fitted.reason)


def choose_monitor(draft: Draft, facts: Facts) -> None:
    """The kNN monitor, where the images have labels and are enough for its neighbours."""
    if facts.classes < 2 or facts.count < FEWEST_MONITORED:
        return
    if draft.stated & {"data.data_dir", "data.data_files", "data.mix"}:
        return  # the monitor has no such keys
    every = max(math.ceil(draft.get("train.epochs") / EVALUATIONS), 1)
    draft.choose("monitor.data", draft.get("data.path"), f"{facts.classes} classes: kNN accuracy shows the progress")
    draft.choose("monitor.every_epochs", every, "about ten times in the run")
    if "monitor.data" in draft.stated:
        return
    for key, own in (*((key, key) for key in ("name", "image_column", "label_column")), ("train_split", "split")):
        if value := draft.get(f"data.{own}"):
            draft.choose(f"monitor.{key}", value, f"as data.{own}")


def hints(draft: Draft, facts: Facts, seconds_per_step: float) -> list[str]:
    """Sentences on what would be better than this plan."""
    found = []
    updates = draft.get("train.epochs") * steps_per_epoch(draft, facts)
    if updates < MIN_UPDATES and seconds_per_step:
        steps = math.ceil(MIN_UPDATES / steps_per_epoch(draft, facts)) * steps_per_epoch(draft, facts)
        longer = _hours_for(steps, seconds_per_step)
        if "train.epochs" in draft.stated:
            longer = f"--set train.epochs={steps // steps_per_epoch(draft, facts)}"
        found.append(f"{pluralize(updates, 'update')} are too few to learn much: {longer} or more")
    if facts.different < FEW and not draft.get("backbone.pretrained") and not facts.moments:
        path, what = draft.get("data.path"), "different images" if facts.copies else "images"
        weights = _public_weights(draft.get("backbone.name")) + (f" --data {shlex.quote(path)}" if path else "")
        found.append(
            f"{facts.different} {what} are few to learn from alone; start from public weights instead: sslkit adapt "
            + weights
        )
    return found


def steps_per_epoch(draft: Draft, facts: Facts) -> int:
    """Whole batches in an epoch."""
    batch_size: int = draft.get("train.batch_size")
    return max(facts.count // batch_size, 1)


def _most_epochs(facts: Facts) -> int:
    return next((epochs for count, epochs in MAX_EPOCHS.items() if facts.count <= count), LONGEST)


def _public_weights(backbone: str) -> str:
    """The timm name of a backbone's public weights; those of a ResNet-50 where it has none."""
    config: Any = timm.get_pretrained_cfg(backbone)
    return f"{config.architecture}.{config.tag}" if config is not None and config.tag else "resnet50.a1_in1k"
