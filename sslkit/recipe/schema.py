"""The tables of a recipe: which keys there are, of what type and within what bounds, and their defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.parts.backbone import BackboneConfig

MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH = 8  # of tables and lists in each other
MAX_WHOLE = 2**63  # TOML's own bound, which Python's reader does not keep
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def check_plain(tables: dict[str, Any], name: str) -> None:
    """See that a recipe is plain data, of a depth and of numbers that recipes have, and holds no access token.

    Its words are copied to run folders, logs and model cards.

    Raises:
        UserError: It is not; ``name`` opens the sentence, which does not repeat what it is about.
    """
    pending: list[tuple[str, Any, int]] = [("", tables, 0)]
    while pending:
        where, value, depth = pending.pop()
        if isinstance(value, dict | list | tuple):  # tuples come from Python
            if depth > MAX_DEPTH:
                raise UserError(f"{name} {where}: tables and lists lie more than {MAX_DEPTH} deep in each other")
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{where}.{key}".lstrip(".")[:100], each, depth + 1) for key, each in inner]
            words = [str(key) for key in value] if isinstance(value, dict) else []
        else:
            words = [value, f"{where}: {value}"] if isinstance(value, str) else []
            if isinstance(value, int) and not -MAX_WHOLE <= value < MAX_WHOLE:
                raise UserError(f"{name} {where}: a whole number of more than 64 bits")
            if not isinstance(value, bool | int | float | str):
                raise UserError(f"{name} {where}: must be a number, a word, a list or a table, not a date or time")
        for word in words[:1] if isinstance(value, str) else words:
            check_path(word, f"{name} {where}".strip(), lines=True)
        if any(without_tokens(word) != word for word in words):
            raise UserError(
                f"{name} {without_tokens(where)}: holds what looks like an access token; give it in the environment "
                "(HF_TOKEN), for recipes are copied to runs, logs and model cards"
            )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimConfig(_Table):
    """``[optim]``.

    Attributes:
        name: ``sgd``, ``lars`` (MoCo v3's and BYOL's), ``lars_simclr`` and ``larc`` (SwAV's) have momentum without
            Nesterov; ``adamw`` and ``lamb`` have betas.
        lr: The paper's base rate, for a batch of 256.
        lr_rule: How the peak rate follows from it: ``linear`` times batch / 256, ``sqrt`` times its root, ``none``.
        weight_decay: Added to the gradient (sgd, lars) or decoupled (adamw, lamb).
        momentum: Of sgd, lars and larc.
        betas: Of adamw and lamb.
        exclude_from_decay: ``norm_and_bias`` frees tensors of at most one axis from weight decay; the papers decay
            everything, except that lars always frees them.
    """

    name: Literal["sgd", "lars", "lars_simclr", "larc", "adamw", "lamb"]
    lr: float = Field(ge=0.0)
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    weight_decay: float = Field(ge=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    exclude_from_decay: Literal["none", "norm_and_bias"] = "none"


class ScheduleConfig(_Table):
    """``[schedule]`` of the learning rate.

    Attributes:
        decay: How it falls from its peak.
        warmup_epochs: Linear rise before that, with every step.
        warmup_start: Rate at the start of the warm-up, as a share of the peak.
        final: Rate at the end of the cosine, as a share of the peak.
        milestones: Epochs at which ``steps`` multiplies the rate by ``factor``.
        per: Whether the decay moves every ``step`` or once per ``epoch``, as the paper does.
        weight_decay_end: Weight decay at the end of training; it follows half a cosine from ``[optim] weight_decay``
            (DINO: 0.04 to 0.4). None: it stays.
    """

    decay: Literal["cosine", "steps", "constant"]
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    warmup_start: float = Field(default=0.0, ge=0.0, le=1.0)
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    milestones: list[Annotated[float, Field(gt=0.0)]] = Field(default_factory=list)
    factor: float = Field(default=0.1, gt=0.0)
    per: Literal["step", "epoch"]
    weight_decay_end: float | None = Field(default=None, ge=0.0)


class TrainConfig(_Table):
    """``[train]``.

    Attributes:
        epochs: Passes over the data; the schedules span them.
        max_steps: Stop after so many updates (0: never); the schedules still span ``epochs``.
        batch_size: Global batch, over all processes.
        micro_batch: Images of a process in the backbone at a time, loss and gradient as ever (0: all at once).
        precision: Of autocast; ``no`` is float32.
        seed: Key of the sample order and of every random draw.
        tf32: Let an Ampere GPU or later round the inputs of float32 matrix products to 10 bits, which PyTorch no longer
            does by itself: much faster, and far more exact than ``bf16``.
        compile: Compile the backbones by ``torch.compile``: minutes at the start, faster steps after that; numbers are
            equal within rounding.
        activation_checkpointing: Keep fewer activations of the student's backbone and compute them again in the
            backward pass (timm's switch): about a third more arithmetic, the same numbers.
        shard: Keep on each process only its part of weights, gradients and optimizer state (FSDP2): for encoders too
            large for one GPU. The numbers are those of whole copies within rounding, and checkpoints are the same.
        clip_norm: Largest norm of the gradient; 0 leaves it alone, as the papers do.
        head_warmup_epochs: Epochs at the start in which only the heads learn: for a backbone that is continued.
        processes: How many processes this run must have; 0 takes what the launcher starts.
        log_every: Steps between lines of metrics.jsonl.
        max_hours: Hours after which to save and stop, as a signal would; the same command continues. 0: no limit.
    """

    epochs: int = Field(strict=True, ge=1, le=1_000_000)
    max_steps: int = Field(strict=True, default=0, ge=0)
    batch_size: int = Field(strict=True, ge=2, le=10_000_000)
    micro_batch: int = Field(strict=True, default=0, ge=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    tf32: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    shard: bool = False
    seed: int = Field(strict=True, default=0, ge=0, lt=2**63)
    clip_norm: float = Field(default=0.0, ge=0.0)
    head_warmup_epochs: float = Field(default=0.0, ge=0.0)
    processes: int = Field(strict=True, default=0, ge=0)
    log_every: int = Field(strict=True, default=10, ge=1)
    max_hours: float = Field(default=0.0, ge=0.0)


class MonitorConfig(_Table):
    """``[monitor]``: kNN on a labelled set of its own, every so many epochs (0: never), and what needs no labels.

    Attributes:
        every_epochs: How often, and once at the end.
        data: A labelled source, in the words of ``[data] path``.
        name: Its configuration, if it has several.
        train_split: The split that is the bank; ``"all"``: everything, of which a fifth is scored. Default: train.
        image_column: Of ``data``, as in ``[data]``.
        label_column: Of ``data``, as in ``[data]``.
        k: Neighbours.
        temperature: Of the neighbours' weights, exp(similarity / temperature).
        max_train: At most so many bank images, the first of a seeded order (0: all).
        layer_gradients: Log the gradient norm of every layer of the backbone: where instability begins (MoCo v3).
        diagnose_every: Steps between lines of diagnostics.jsonl (0: none); each costs two small forward passes.
    """

    every_epochs: int = Field(strict=True, default=0, ge=0)
    data: str = ""
    name: str | None = None
    train_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    k: int = Field(strict=True, default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0.0)
    max_train: int = Field(strict=True, default=0, ge=0)
    layer_gradients: bool = False
    diagnose_every: int = Field(strict=True, default=50, ge=0)

    @model_validator(mode="after")
    def _has_data(self) -> "MonitorConfig":
        if self.every_epochs and not self.data:
            raise ValueError("every_epochs needs data, a labelled source")
        return self

    def source(self) -> DataConfig:
        """The labelled images."""
        return DataConfig(
            path=self.data,
            name=self.name,
            split=self.train_split or "train",
            image_column=self.image_column,
            label_column=self.label_column,
        )


class CheckpointConfig(_Table):
    """``[checkpoint]``: when the run is saved, and which of its checkpoints stay.

    With ``[guard] policy = "skip"``, checkpoints of ``every_steps`` (of every 1000 steps where it is 0), of
    ``keep_every_epochs`` and of ``keep_best`` are rewind points: the run can go back to them. The newest stays.

    Attributes:
        every_steps: Save every so many steps (0: never); the end of the run is always saved.
        every_minutes: Save every so many minutes (0: never).
        keep: The newest so many stay.
        keep_every_epochs: Save at the end of every so many epochs too, and keep these for good (0: none).
        keep_best: ``"knn"``: save whenever ``[monitor]`` measures kNN too, and keep the best of these. Empty: none.
    """

    every_steps: int = Field(strict=True, default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0.0)
    keep: int = Field(strict=True, default=2, ge=1)
    keep_every_epochs: int = Field(strict=True, default=0, ge=0)
    keep_best: Literal["", "knn"] = ""


class GuardConfig(_Table):
    """``[guard]``: what is done when numbers or processes go wrong.

    Attributes:
        policy: For a step whose loss or gradient is not finite, or whose loss is a spike: ``stop`` the run, or
            ``skip`` the step. Either way it never reaches weights, teacher or queue.
        loss_spike: A loss above so many times the median of the last 50 is a spike; 0: none is.
        max_skips: Steps in a row that may be skipped; then the run goes back to its newest rewind point (see
            `CheckpointConfig`) and takes the images in another order from there.
        max_rewinds: How often it may go back before it stops after all.
        rewind_lr: Factor on the learning rate each time it goes back.
        compare_every: Steps between comparisons of the processes' weights; 0: never.
        timeout_seconds: How long a process may keep the others waiting before the run is ended.
    """

    policy: Literal["stop", "skip"] = "stop"
    loss_spike: float = Field(default=0.0, ge=0.0)
    max_skips: int = Field(strict=True, default=10, ge=0)
    max_rewinds: int = Field(strict=True, default=1, ge=0)
    rewind_lr: float = Field(default=1.0, gt=0.0, le=1.0)
    compare_every: int = Field(strict=True, default=500, ge=0)
    timeout_seconds: float = Field(default=600.0, gt=0.0, le=86400.0)


class TrackConfig(_Table):
    """``[track]``: who else is told of a run; the files in its folder are always written.

    Attributes:
        trackers: ``with`` in a recipe: any of ``tensorboard``, ``wandb``, ``trackio`` and ``mlflow``, through
            Accelerate.
        project: What they file the run under; TensorBoard has its files in the run folder.
        images: Show them views, once, and nearest neighbours at every kNN of ``[monitor]``.
    """

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(default_factory=list, alias="with")
    project: str = Field(default="sslkit", min_length=1)
    images: bool = True

    @model_validator(mode="after")
    def _once_each(self) -> "TrackConfig":
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("with names a tracker twice")
        return self


TABLES: dict[str, type[BaseModel]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "views": ViewsConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "monitor": MonitorConfig,
    "checkpoint": CheckpointConfig,
    "guard": GuardConfig,
    "track": TrackConfig,
}
