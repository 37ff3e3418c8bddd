"""The rules of the plan: each fills in some keys of a draft from the facts, with a reason a key.

The numbers come from the experiments in docs/plan.md (`benchmarks/plan_experiments.py`). What a method needs of its own
options is the method's to say: `Method.fitted_options`.
"""

import math
import shlex
from typing import Any

import timm

from sslkit.doctor.image_checks import SMALLEST_VIEW
from sslkit.methods import Progress, find_method
from sslkit.methods.method_options import power_of_two
from sslkit.parts.backbone import family
from sslkit.plan.draft import Draft
from sslkit.plan.facts import Facts
from sslkit.recipe.schema import EVALUATIONS
from sslkit.text import format_duration, pluralize

VIEW_SIZES = (SMALLEST_VIEW, 96, 128, 160, 192, 224)
REDUCTION = 32  # the stride of a ResNet: from 64 pixels, 2 x 2 positions are left
LARGEST_ON_CPU = 96
BLUR_PER_PIXEL = 2.0 / 224  # the papers' largest blur, for views of 224 pixels
SMALLEST_BLURRED = 96  # of smaller views a blur to scale is less than a pixel wide
WEAK_JITTER, WEAK_GRAY = [0.2, 0.2, 0.2, 0.05], 0.05  # brightness, contrast, saturation, hue; probability of grey
BATCH_ON_CPU, BATCH_ON_GPU, LARGEST_BATCH = 64, 256, 1024
SMALLEST_BATCH = 32  # the doctor warns of smaller ones
STEPS_PER_EPOCH = 16  # an epoch has at least so many, where the images allow
RATES = {"resnet": 1e-3, "vit": 5e-4, "other": 1e-3}  # of AdamW, up to a batch of 256
PRETRAINED_RATE = 1e-4
SGD_RATE = 0.03
FEW, MANY = 10_000, 100_000  # images
MAX_EPOCHS = {FEW: 400, MANY: 300}
LONGEST, UNMEASURED_EPOCHS = 200, 100  # epochs: of more images; where the time of a step is not known
TRAINING_SHARE = 0.9  # of the time; the rest is for evaluations and checkpoints
WARMUP_SHARE = 0.1
FEWEST_MONITORED = 50
FEWEST_UPDATES = 600  # of the runs in docs/plan.md


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
    fitting = [size for size in VIEW_SIZES if size <= max(facts.short_side, VIEW_SIZES[0])]
    size = min(fitting[-1], LARGEST_ON_CPU) if facts.device == "cpu" else fitting[-1]
    limited = f"; at most {LARGEST_ON_CPU} on a CPU" if size < fitting[-1] else ""
    if facts.short_side < size:
        limited = f": enlarged, because most networks reduce their input {REDUCTION} times"
    draft.choose("views.size", size, f"the images have {facts.short_side} pixels on the shorter side{limited}")
    size = draft.get("views.size")
    if size < SMALLEST_BLURRED and "views.blur_sigma" not in draft.stated:
        draft.choose("views.blur_prob", 0.0, f"a blur in proportion to views of {size} pixels changes nothing")
    else:
        sigma = [0.1, max(round(size * BLUR_PER_PIXEL, 2), 0.2)]
        draft.choose("views.blur_sigma", sigma, f"the paper's 2 pixels of 224, for {size}")
    if facts.grey or facts.moments:
        kind = "have other channels than RGB" if facts.moments else "are grey"
        draft.choose("views.jitter", [*WEAK_JITTER[:2], 0.0, 0.0], f"the images {kind}: brightness and contrast only")
        draft.choose("views.gray_prob", 0.0, f"the images {kind}")
    elif facts.count <= MANY:
        draft.choose("views.jitter", WEAK_JITTER, "half the paper's changes, so that the encoder still learns colour")
        draft.choose("views.gray_prob", WEAK_GRAY, "a quarter of the paper's")
    if facts.moments:
        for key, values in zip(("views.mean", "views.std"), facts.moments, strict=True):
            draft.choose(key, values, "measured on a sample of the images")


def choose_batch(draft: Draft, facts: Facts) -> None:
    """Batch size, a multiple of the number of processes."""
    usual = BATCH_ON_CPU if facts.device == "cpu" else min(BATCH_ON_GPU * facts.processes, LARGEST_BATCH)
    size = min(usual, power_of_two(max(facts.count / STEPS_PER_EPOCH, SMALLEST_BATCH)), power_of_two(facts.count))
    size = max(size // facts.processes, 2) * facts.processes
    steps = facts.count // size
    is_usual = size >= usual // facts.processes * facts.processes
    why = "usual on this device" if is_usual else f"so that an epoch has {pluralize(steps, 'step')}"
    draft.choose("train.batch_size", size, why)


def choose_optimizer(draft: Draft, facts: Facts) -> None:
    """Optimizer and learning rate. The paper's optimizer, if it is stated, keeps the paper's numbers."""
    draft.choose("optim.name", "adamw", "learns in few epochs, whatever the backbone")
    batch_size, kind = draft.get("train.batch_size"), family(draft.get("backbone.name"))
    paper = find_method(draft.get("method.name")).paper_defaults(kind).get("optim", {})
    if draft.get("optim.name") == "sgd" and paper.get("name") != "sgd":
        draft.choose("optim.lr", SGD_RATE, "of MoCo v1, for a batch of 256")
        draft.choose("optim.lr_rule", "linear", "as in MoCo v1")
        draft.choose("optim.weight_decay", 1e-4, "as in MoCo v1")
        draft.choose("optim.momentum", 0.9, "as in MoCo v1")
    elif draft.get("optim.name") == "adamw":
        rate, why = RATES[kind], "of AdamW for a network from random weights"
        if draft.get("backbone.pretrained"):
            rate, why = PRETRAINED_RATE, "low, to keep what the pretrained weights know"
        factor = math.sqrt(max(batch_size / BATCH_ON_GPU, 1.0))
        draft.choose("optim.lr", float(f"{rate * factor:.2g}"), why)
        draft.choose("optim.lr_rule", "none", "the rate is for this batch size")
        draft.choose("optim.weight_decay", 0.01, "PyTorch's default for AdamW")
        draft.choose("optim.betas", [0.9, 0.999], "PyTorch's default")
    if not draft.stated & {"schedule.decay", "schedule.milestones"}:
        draft.choose("schedule.decay", "cosine", "needs no milestones")
        draft.choose("schedule.per", "step", "the run is short")


def choose_length(draft: Draft, facts: Facts, seconds_per_step: float) -> None:
    """Epochs, from the time there is; ``seconds_per_step`` is 0 if it was not measured."""
    affordable = (
        UNMEASURED_EPOCHS
        if not seconds_per_step
        else int(TRAINING_SHARE * facts.hours * 3600 / (seconds_per_step * steps_per_epoch(draft, facts)))
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
    warmup = round(draft.get("train.epochs") * WARMUP_SHARE, 2)
    draft.choose("schedule.warmup_epochs", warmup, f"{WARMUP_SHARE:.0%} of the run")


def choose_options(draft: Draft, facts: Facts) -> None:
    """Options of the method that depend on the number of images and the length of the run."""
    epoch, batch_size = steps_per_epoch(draft, facts), draft.get("train.batch_size")
    start = Progress(0, draft.get("train.epochs") * epoch, epoch, batch_size)
    for key, fitted in find_method(draft.get("method.name")).fitted_options(facts.count, start).items():
        if key == "momentum_half_life" and draft.stated & {"method.momentum", "method.momentum_schedule"}:
            continue  # it would take their place
        draft.choose(f"method.{key}", fitted.value, fitted.reason)


def choose_monitor(draft: Draft, facts: Facts) -> None:
    """The kNN monitor, where the images have labels and are enough for its neighbours."""
    if facts.classes < 2 or facts.count < FEWEST_MONITORED:
        return
    if draft.stated & {"data.data_dir", "data.data_files"}:
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
    if updates < FEWEST_UPDATES and seconds_per_step:
        longer = ""
        if "train.epochs" in draft.stated:
            longer = f": --set train.epochs={math.ceil(FEWEST_UPDATES / steps_per_epoch(draft, facts))} or more"
        elif draft.get("train.epochs") < _most_epochs(facts):
            hours = FEWEST_UPDATES * seconds_per_step / TRAINING_SHARE / 3600
            longer = f": --hours {math.ceil(hours * 100) / 100:g} or more"
        found.append(
            f"{pluralize(updates, 'update')} are few; the shortest runs in docs/plan.md have {FEWEST_UPDATES}{longer}"
        )
    if facts.count < FEW and not draft.get("backbone.pretrained") and not facts.moments:
        found.append(
            f"{facts.count} images are few to learn from alone; start from public weights instead: sslkit adapt "
            f"{_public_weights(draft.get('backbone.name'))} --data {shlex.quote(draft.get('data.path'))}"
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
