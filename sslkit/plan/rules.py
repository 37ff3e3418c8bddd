"""The rules of the plan: each fills in some keys of a draft from the facts, with a reason a key.

The numbers come from the experiments in docs/plan.md (`benchmarks/plan_experiments.py`). What a method needs of its own
options is the method's to say: `Method.fitted_options`.
"""

import math

from sslkit.methods import Progress, find_method
from sslkit.plan.draft import Draft
from sslkit.plan.facts import Facts
from sslkit.recipe.schema import OptimConfig
from sslkit.text import format_duration

VIEW_SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
LARGEST_ON_CPU = 96
BLUR_PER_PIXEL = 2.0 / 224  # the papers' largest blur, for views of 224 pixels
SMALLEST_BLURRED = 64  # of smaller views a blur to scale is less than a pixel wide
JITTER, GREY_JITTER = [0.4, 0.4, 0.4, 0.1], [0.4, 0.4, 0.0, 0.0]
BATCH_ON_CPU, BATCH_ON_GPU = 64, 256
STEPS_PER_EPOCH = 16  # at least, where the images allow: batches of small data stay small
FEW, MANY = 10_000, 100_000  # images
MAX_EPOCHS = {FEW: 400, MANY: 300}
LONGEST = 200
WARMUP_SHARE, MAX_WARMUP = 0.05, 10.0
EVALUATIONS = 10
PRETRAINED_HINT = (
    "{count} images are few to learn from alone: public weights, continued on them, are usually better (sslkit adapt "
    "WEIGHTS --data {data})"
)


def choose_model(draft: Draft, facts: Facts) -> None:
    """Method and backbone."""
    draft.choose("method.name", "moco_v2", "its negatives come from a queue, so a small batch is enough")
    if facts.device == "cpu":
        draft.choose("backbone.name", "resnet18", "small enough to train on a CPU")
    else:
        draft.choose("backbone.name", "resnet50", "the usual size for a GPU")


def choose_views(draft: Draft, facts: Facts) -> None:
    """Size, crops, colour and blur of the views. Everything in pixels is relative to the size."""
    draft.choose("views.policy", "moco_v2", "crops, colour, grey and mirroring, as in most papers")
    fitting = [size for size in VIEW_SIZES if size <= max(facts.short_side, VIEW_SIZES[0])]
    size = min(fitting[-1], LARGEST_ON_CPU) if facts.device == "cpu" else fitting[-1]
    limited = f", at most {LARGEST_ON_CPU} on a CPU" if size < fitting[-1] else ""
    draft.choose("views.size", size, f"the images have {facts.short_side} pixels on the shorter side{limited}")
    size = draft.get("views.size")
    if size < SMALLEST_BLURRED:
        draft.choose("views.blur_prob", 0.0, f"a blur in proportion to views of {size} pixels changes nothing")
    else:
        draft.choose("views.blur_prob", 0.5, "as in the paper")
        sigma = [0.1, max(round(size * BLUR_PER_PIXEL, 2), 0.2)]
        draft.choose("views.blur_sigma", sigma, f"the paper's 2 pixels of 224, for {size}")
    if facts.grey:
        draft.choose("views.jitter", GREY_JITTER, "the images are grey: brightness and contrast only")
        draft.choose("views.gray_prob", 0.0, "the images are grey")


def choose_batch(draft: Draft, facts: Facts) -> None:
    """Batch size."""
    usual = BATCH_ON_CPU if facts.device == "cpu" else BATCH_ON_GPU
    size = min(usual, _power_of_two(max(facts.count / STEPS_PER_EPOCH, 16)))
    why = "usual on this device" if size == usual else f"so that {facts.count} images give {facts.count // size} steps"
    draft.choose("train.batch_size", size, why)


def choose_optimizer(draft: Draft, facts: Facts) -> None:
    """Optimizer and learning rate."""
    draft.choose("optim.name", "adamw", "learns in few epochs, whatever the backbone")
    if draft.get("optim.name") == "adamw":
        draft.choose("optim.lr", 1e-3, "of AdamW for small batches")
        draft.choose("optim.lr_rule", "none", "the rate is for this batch size")
        draft.choose("optim.weight_decay", 0.01, "PyTorch's default for AdamW")
        fields = OptimConfig.model_fields
        draft.choose("optim.betas", list(fields["betas"].default), "PyTorch's default")
    draft.choose("schedule.decay", "cosine", "needs no milestones")
    draft.choose("schedule.per", "step", "the run is short")


def choose_length(draft: Draft, facts: Facts, seconds_per_step: float) -> None:
    """Epochs, from the time there is."""
    steps_per_epoch = max(facts.count // draft.get("train.batch_size"), 1)
    affordable = int(facts.hours * 3600 / (seconds_per_step * steps_per_epoch))
    most = next((epochs for count, epochs in MAX_EPOCHS.items() if facts.count <= count), LONGEST)
    epochs = min(max(affordable, 1), most)
    why = (
        f"what fits in {format_duration(3600 * facts.hours)}"
        if epochs < most
        else f"more gains little on {facts.count} images"
    )
    draft.choose("train.epochs", epochs, why)
    warmup = round(min(draft.get("train.epochs") * WARMUP_SHARE, MAX_WARMUP), 2)
    draft.choose("schedule.warmup_epochs", warmup, f"{WARMUP_SHARE:.0%} of the run, at most {MAX_WARMUP:g} epochs")


def choose_options(draft: Draft, facts: Facts) -> None:
    """Options of the method that depend on the number of images and the length of the run."""
    batch_size = draft.get("train.batch_size")
    steps_per_epoch = max(facts.count // batch_size, 1)
    start = Progress(0, draft.get("train.epochs") * steps_per_epoch, steps_per_epoch, batch_size)
    for key, fitted in find_method(draft.get("method.name")).fitted_options(facts.count, start).items():
        draft.choose(f"method.{key}", fitted.value, fitted.reason)


def choose_monitor(draft: Draft, facts: Facts) -> None:
    """The kNN monitor, where the images have labels."""
    if facts.classes < 2:
        return
    every = max(math.ceil(draft.get("train.epochs") / EVALUATIONS), 1)
    draft.choose("monitor.data", draft.get("data.path"), f"{facts.classes} folders or labels: kNN shows progress")
    draft.choose("monitor.every_epochs", every, "about ten times in the run")


def hints(draft: Draft, facts: Facts) -> list[str]:
    """Sentences on what would be better than this plan."""
    found = []
    if facts.count < FEW and not draft.get("backbone.pretrained"):
        found.append(PRETRAINED_HINT.format(count=facts.count, data=draft.get("data.path")))
    return found


def _power_of_two(limit: float) -> int:
    """The largest power of two up to ``limit``."""
    return 1 << max(int(limit), 1).bit_length() - 1
