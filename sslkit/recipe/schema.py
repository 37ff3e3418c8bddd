"""The tables of a recipe: their keys with types, bounds and defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.parts.adaptation.adapt_config import AdaptConfig
from sslkit.parts.backbone import BackboneConfig

MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH = 8  # of nested tables and lists
EVALUATIONS = 10  # by kNN in a run, unless the recipe states how many
MAX_INTEGER = 2**63  # the bound of TOML, which tomllib does not check
SWITCH = TypeAdapter(bool)
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def check_plain(tables: dict[str, Any], name: str) -> None:
    """Check that a recipe is plain data of bounded depth, and contains no access token.

    Otherwise raise a UserError whose message starts with ``name``.
    """
    pending: list[tuple[str, Any, int]] = [("", tables, 0)]
    while pending:
        where, value, depth = pending.pop()
        texts = [value] if isinstance(value, str) else [str(key) for key in value] if isinstance(value, dict) else []
        if isinstance(value, dict | list | tuple):  # tuples come from Python
            if depth > MAX_DEPTH:
                raise UserError(f"{name} {where}: tables and lists are nested more than {MAX_DEPTH} deep")
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{where}.{key}".lstrip(".")[:100], item, depth + 1) for key, item in inner]
        elif not isinstance(value, bool | int | float | str):
            raise UserError(f"{name} {where}: must be a number, a string, a list or a table, not a date or time")
        elif isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
            raise UserError(f"{name} {where}: an integer of more than 64 bits")
        for text in texts:
            check_path(text, f"{name} {where}".strip(), lines=True)
        with_key = [f"{where}: {value}"] if isinstance(value, str) else []  # some tokens are recognised by their key
        if any(without_tokens(text) != text for text in texts + with_key):
            raise UserError(
                f"{name} {without_tokens(where)}: contains what looks like an access token; set it in the environment "
                "(HF_TOKEN), because recipes are copied to run folders, logs and model cards"
            )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimConfig(_Table):
    """``[optim]``.

    Attributes:
        name: ``lars`` is that of MoCo v3 and BYOL, ``larc`` that of SwAV.
        lr: Base learning rate of the paper, for a batch size of 256.
        lr_rule: Scaling of the peak learning rate: ``linear`` by batch size / 256, ``sqrt`` by its root, or ``none``.
        weight_decay: Added to the gradient (sgd, lars) or decoupled (adamw, lamb).
        momentum: Momentum of sgd, lars and larc, without Nesterov.
        betas: Betas of adamw and lamb.
        exclude_from_decay: ``norm_and_bias`` exempts tensors with at most one dimension, as lars always does.
    """

    name: Literal["sgd", "lars", "lars_simclr", "larc", "adamw", "lamb"]
    lr: float = Field(ge=0.0)
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    weight_decay: float = Field(ge=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    exclude_from_decay: Literal["none", "norm_and_bias"] = "none"


class ScheduleConfig(_Table):
    """``[schedule]`` of the learning rate (lr).

    Attributes:
        decay: Shape of the decay from the peak lr.
        warmup_epochs: Epochs of linear warm-up before the decay.
        warmup_start: lr at the start of the warm-up, as a fraction of the peak.
        final: lr at the end of the cosine, as a fraction of the peak.
        milestones: Epochs at which ``steps`` multiplies the lr by ``factor``.
        per: Whether the lr decays at every ``step`` or once per ``epoch``, as in the paper.
        weight_decay_end: Weight decay at the end, reached by half a cosine (DINO: 0.04 to 0.4). None: constant.
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
        epochs: Passes over the data; the schedules span all epochs.
        max_steps: Stop after this many updates (0: no limit); the schedules still span ``epochs``.
        batch_size: Global batch size, over all processes.
        micro_batch: Images per process that pass through the backbone at a time (0: all), with the loss and gradient of
            the whole batch.
        precision: Autocast dtype; ``no`` is float32. ``auto`` is bf16 on GPUs that have it (NVIDIA: from Ampere on) and
            float32 elsewhere. The run folder records which it was, and a resumed run keeps it.
        seed: Seed of the sample order and of every random draw.
        tf32: Compute float32 matrix products and convolutions in TF32 on Ampere and later GPUs: faster, inputs have 10
            bits of mantissa. False: in float32, the convolutions too.
        compile: Compile the backbones with ``torch.compile``: slower start, faster steps, equal within rounding.
            ``true`` compiles each as a whole, ``"blocks"`` each block, which takes less time at the start.
        activation_checkpointing: Recompute activations of the student's backbone in the backward pass to save memory:
            about a third more computation, same results.
        shard: Shard weights, gradients and optimizer state over the processes (FSDP2). Results are equal within
            rounding, and checkpoints have the same format.
        clip_norm: Maximum gradient norm; 0 does not clip, as in the papers.
        head_warmup_epochs: Epochs at the start in which only the heads are trained, for pretrained backbones.
        processes: Required number of processes; 0 accepts any.
        log_every: Steps between rows of metrics.jsonl.
        max_hours: Hours after which the run saves and stops; the same command continues. 0: no limit.
    """

    epochs: int = Field(strict=True, ge=1, le=1_000_000)
    max_steps: int = Field(strict=True, default=0, ge=0)
    batch_size: int = Field(strict=True, ge=2, le=10_000_000)
    micro_batch: int = Field(strict=True, default=0, ge=0)
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    tf32: bool = False
    compile: bool | Literal["blocks"] = False
    activation_checkpointing: bool = False
    shard: bool = False
    seed: int = Field(strict=True, default=0, ge=0, lt=2**63)
    clip_norm: float = Field(default=0.0, ge=0.0)
    head_warmup_epochs: float = Field(default=0.0, ge=0.0)
    processes: int = Field(strict=True, default=0, ge=0)
    log_every: int = Field(strict=True, default=10, ge=1)
    max_hours: float = Field(default=0.0, ge=0.0)

    @field_validator("compile", mode="before")
    @classmethod
    def _is_switch_or_blocks(cls, value: Any) -> Any:
        if value == "blocks":
            return value
        try:
            return SWITCH.validate_python(value)
        except ValidationError:
            raise ValueError('must be true, false or "blocks"') from None


class MonitorConfig(_Table):
    """``[monitor]``: kNN evaluation on labelled images during training, and diagnostics without labels.

    Attributes:
        every_epochs: Epochs between kNN evaluations (0: none); another follows at the end of the run. Default: about
            `EVALUATIONS` evaluations in the run if ``data`` is given, else none.
        data: A labelled source, as in ``[data] path``.
        name: Configuration of ``data``, if it has several.
        train_split: Split of the training images; ``"all"`` uses all images and scores a fifth of them. Default: train.
        image_column: Image column of ``data``; likewise ``label_column``.
        k: Number of neighbours.
        temperature: Temperature of the weights of neighbours, exp(similarity / temperature).
        max_train: Maximum number of training images, taken in a seeded random order (0: all).
        layer_gradients: Log the gradient norm of every layer, which shows where instability begins (MoCo v3).
        diagnose_every: Steps between rows of diagnostics.jsonl (0: none). Each costs two small forward passes.
    """

    every_epochs: int | None = Field(strict=True, default=None, ge=0)
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

    def spread_over(self, epochs: int) -> "MonitorConfig":
        """Set ``every_epochs`` for a run of this length if it is not stated; it then still counts as not stated."""
        if self.every_epochs is not None:
            return self
        chosen = self.model_copy(update={"every_epochs": max(epochs // EVALUATIONS, 1) if self.data else 0})
        chosen.model_fields_set.discard("every_epochs")
        return chosen

    def source(self) -> DataConfig:
        """The labelled images."""
        columns = self.model_dump(include={"name", "image_column", "label_column"})
        return DataConfig(path=self.data, split=self.train_split or "train", **columns)


class CheckpointConfig(_Table):
    """``[checkpoint]``: when checkpoints are saved, and which are kept.

    With ``[guard] policy = "skip"``, checkpoints of ``every_steps`` (every 1000 steps if it is 0), of
    ``keep_every_epochs`` and of ``keep_best`` are rewind points: the run can go back to them. The newest is kept.

    Attributes:
        every_steps: Steps between checkpoints (0: none); the end of the run is always saved.
        every_minutes: Minutes between checkpoints (0: none).
        keep: Number of newest checkpoints to keep.
        keep_every_epochs: Also save after every this many epochs, and keep these checkpoints (0: none).
        keep_best: ``"knn"``: also save after each kNN evaluation of ``[monitor]``, and keep the best. Empty: none.
    """

    every_steps: int = Field(strict=True, default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0.0)
    keep: int = Field(strict=True, default=2, ge=1)
    keep_every_epochs: int = Field(strict=True, default=0, ge=0)
    keep_best: Literal["", "knn"] = ""


class GuardConfig(_Table):
    """``[guard]``: what to do about bad steps and failing processes.

    Attributes:
        policy: ``stop`` the run at a bad step, whose loss or gradient is not finite or whose loss is a spike, or
            ``skip`` the step. A bad step never changes weights, teacher or queue.
        loss_spike: A loss above this many times the median of the last 50 losses is a spike; 0: no check.
        max_skips: Maximum number of consecutive skipped steps; then the run goes back to its newest rewind point (see
            `CheckpointConfig`) and continues with another order of the images.
        max_rewinds: Maximum number of rewinds; then the run stops.
        rewind_lr: Factor on the learning rate at each rewind.
        compare_every: Steps between comparisons of the weights of all processes; 0: none.
        timeout_seconds: Seconds that processes wait for another one before the run ends.
    """

    policy: Literal["stop", "skip"] = "stop"
    loss_spike: float = Field(default=0.0, ge=0.0)
    max_skips: int = Field(strict=True, default=10, ge=0)
    max_rewinds: int = Field(strict=True, default=1, ge=0)
    rewind_lr: float = Field(default=1.0, gt=0.0, le=1.0)
    compare_every: int = Field(strict=True, default=500, ge=0)
    timeout_seconds: float = Field(default=600.0, gt=0.0, le=86400.0)


class TrackConfig(_Table):
    """``[track]``: experiment trackers. The files in the run folder are always written.

    Attributes:
        trackers: The key ``with`` in a recipe: which trackers to use, through Accelerate.
        project: Project name in the trackers. TensorBoard writes to the run folder instead.
        images: Log sample views at the start, and nearest neighbours at every kNN evaluation.
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
    "adapt": AdaptConfig,
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


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a table, as a recipe writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]
