"""From a recipe to a training state: build the method, the optimizer and the loader, and load a checkpoint."""

import os

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.loading.loader import cores_of_a_process
from sslkit.data.loading.upload import Uploader
from sslkit.data.loading.worker_pool import TrainLoader
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.sharding import shard
from sslkit.engine.accelerator import processes_here, workers_of
from sslkit.engine.checkpoint.format import Checkpoint, restore
from sslkit.engine.optim import make_optimizer, supports_found_inf
from sslkit.engine.runtime.compilation import compile_encoders
from sslkit.engine.runtime.precision import chosen_precision
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.errors import UserError
from sslkit.methods import Method, find_method
from sslkit.parts.adaptation.adapt_config import AdaptConfig
from sslkit.parts.adaptation.anchor import Anchor
from sslkit.parts.adaptation.lora import add_lora
from sslkit.parts.adaptation.trained_layers import train_last_blocks
from sslkit.parts.backbone import (
    BackboneConfig,
    create_backbone,
    feature_dim,
    recompute_activations,
    takes_image_size,
)
from sslkit.parts.batch_slices import local_bn_groups
from sslkit.parts.batchnorm import batch_norms, has_batch_norm
from sslkit.parts.memory_bank import MemoryBank
from sslkit.recipe.resolve import Recipe
from sslkit.text import pluralize

LAG = 2  # steps


def set_up_training(
    recipe: Recipe,
    source: ImageSource,
    accelerator: Accelerator,
    *,
    checkpoint: Checkpoint | None = None,
    recovery: RecoveryState | None = None,
    method: Method | None = None,
) -> TrainingState:
    """Build what the recipe asks for and wire it to the processes; all processes call it together.

    ``recovery`` has the bad steps and rewinds before ``checkpoint``. If ``method`` is None, it is built.

    Raises:
        UserError: The batch does not fit the data or the processes, the checkpoint does not fit the recipe, or memory
            does not suffice.
    """
    epoch_steps = steps_per_epoch(recipe, source)
    if method is None:
        torch.manual_seed(recipe.train.seed)
        method = build_method(recipe, len(source))
    check_batch_split(recipe, method, accelerator.num_processes)
    if has_batch_norm(method):
        method.synchronise_batch_norm(accelerator.device)
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A thread that shares its core with a data worker slows all the others down.
        torch.set_num_threads(max(cores_of_a_process(processes_here()) - workers_of(recipe, accelerator), 1))
    # FSDP2 takes contiguous parameters only.
    memory_format = torch.contiguous_format if recipe.train.shard else torch.channels_last
    method.to(accelerator.device, memory_format=memory_format)  # type: ignore[call-overload]
    compile_encoders(method.backbones(), recipe.train.compile, recipe.backbone.name)
    if recipe.train.shard:
        low = torch.bfloat16 if chosen_precision(recipe) == "bf16" else None
        norms = batch_norms(method)
        shard(method, method.backbones(), accelerator.device, compute_dtype=low, full_precision=norms)
    optimizer = make_optimizer(recipe, method)
    if checkpoint is not None:
        check_memory(checkpoint, method)
        restore(checkpoint, method, optimizer, accelerator.scaler)
    # A sharded method reduces its gradients itself; Accelerate then adds mixed precision but no DDP.
    wrapped = accelerator.prepare_model(method, evaluation_mode=recipe.train.shard)
    prepared = accelerator.prepare_optimizer(optimizer)
    step, recovery = checkpoint.step if checkpoint else 0, recovery or RecoveryState()
    lag = lag_of(recipe, accelerator.device, optimizer)
    return TrainingState(recipe, accelerator, source, method, wrapped, prepared, epoch_steps, step, recovery, lag)


def lag_of(recipe: Recipe, device: torch.device, optimizer: Optimizer) -> int:
    """How many steps to start before the numbers of one are read: on a GPU, if the update can be left to its decision.

    Sharded parameters are updated on the host's word.
    """
    gated = supports_found_inf(optimizer) and not recipe.train.shard
    return LAG if device.type == "cuda" and gated else 0


def build_method(recipe: Recipe, num_samples: int = 0) -> Method:
    """Build the recipe's method on its backbone, on the CPU, initialised from torch's current random state.

    ``num_samples`` is the number of images in the data: the rows of a memory bank.

    Raises:
        UserError: The method needs more memory than this machine has.
    """
    spec = recipe.backbone_config()
    backbone = create_backbone(spec)
    width = feature_dim(backbone, recipe.views.size, channels=spec.channels)
    if recipe.views.local.count:
        feature_dim(backbone, recipe.views.policy_of("local").size, "local.size", spec.channels)
    adapt = recipe.adapt
    anchor = _anchor(spec, backbone, adapt) if adapt.anchor else None
    if adapt.last_blocks:
        train_last_blocks(backbone, adapt.last_blocks)
    if adapt.lora_rank:
        add_lora(backbone, adapt.lora_rank)
    try:
        method = find_method(recipe.method_name)(backbone, width, recipe.method)
        method.set_num_samples(num_samples)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise UserError(
            "[method]: not enough memory for heads, queue or memory bank; reduce hidden_dim, queue_size or batch size"
        ) from error
    if recipe.train.activation_checkpointing:
        recompute_activations(method.backbone, recipe.backbone.name)
    if adapt.keeps_statistics:
        method.keep_statistics()
    if anchor is not None:
        method.keep_near(anchor)
    if recipe.train.micro_batch and has_batch_norm(backbone) and not adapt.keeps_statistics:
        # A slice has batch statistics of its own, whatever process it is on.
        method.bn_groups = max(recipe.train.batch_size // recipe.train.micro_batch, method.bn_groups)
    return method


def _anchor(spec: BackboneConfig, backbone: nn.Module, adapt: AdaptConfig) -> Anchor:
    """The frozen start. With an image size of its own, its position embedding is resized from the weights' once."""
    start = backbone
    if adapt.anchor_size and takes_image_size(spec.name):
        start = create_backbone(spec.model_copy(update={"img_size": adapt.anchor_size}))
    return Anchor(start, adapt.anchor, adapt.anchor_size, spec.channels)


def steps_per_epoch(recipe: Recipe, source: ImageSource) -> int:
    """Whole batches in an epoch; raises a UserError if there is none. Other images are left over in each epoch."""
    if recipe.train.batch_size > len(source):
        raise UserError(
            f"[train] batch_size: {recipe.train.batch_size} is more than the {len(source)} images of "
            f"{source.description}; set it to {len(source)} or less, and [method] bn_groups to a divisor, such as 1"
        )
    return len(source) // recipe.train.batch_size


def check_steps_left(recipe: Recipe, source: ImageSource, checkpoint: Checkpoint) -> None:
    """Raise a UserError if a run that starts from another run's checkpoint would have no step to make."""
    period, train, step = steps_per_epoch(recipe, source), recipe.train, checkpoint.step
    if 0 < train.max_steps <= step:
        raise UserError(
            f"--resume: {checkpoint.folder} is of step {step}, and [train] max_steps = {train.max_steps} ends this run "
            f"before; set train.max_steps={step + period}, or 0 for no limit"
        )
    if step >= train.epochs * period:
        raise UserError(
            f"--resume: {checkpoint.folder} is of step {step}, and {pluralize(train.epochs, 'epoch')} of {period} "
            f"steps end there or before; set train.epochs={step // period + 1} or more"
        )


def check_memory(checkpoint: Checkpoint, method: Method) -> None:
    """Raise a UserError if a checkpoint has a memory bank of other images; only for runs that start from another's."""
    for name, bank in method.dictionaries().items():
        rows = checkpoint.model.get(f"{name}.rows")
        if isinstance(bank, MemoryBank) and rows is not None and rows.ndim and len(rows) != len(bank.rows):
            raise UserError(
                f"{checkpoint.folder}: has a memory bank of {len(rows)} images, and the data has {len(bank.rows)}; a "
                "method with a memory bank cannot go on with other images: start a new run, without --resume"
            )


def check_batch_split(recipe: Recipe, method: Method, processes: int) -> None:
    """Raise a UserError if the batch does not split equally into processes, slices and BN groups of each module."""
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    if micro and batch % (processes * micro):
        divisors = [each for each in range(1, batch // processes + 1) if batch % (processes * each) == 0]
        fitting = sorted(
            {max(filter(micro.__gt__, divisors), default=1), min(filter(micro.__lt__, divisors), default=0)}
        )
        raise UserError(
            f"[train] micro_batch: {micro} does not divide the {batch / processes:g} images of each process's part of "
            f"[train] batch_size = {batch}; take {' or '.join(str(each) for each in fitting if each)}"
        )
    for groups in dict.fromkeys(method.batch_norm_groups().values()):
        across = method.groups_across_processes
        if (processes < groups and groups % processes) or (across and groups < processes and processes % groups):
            raise UserError(f"[method] bn_groups: {groups} groups cannot be shared by {processes} processes")
        parts = processes * local_bn_groups(groups)
        if batch % parts or batch // parts < 2:
            raise UserError(
                f"[train] batch_size: {batch} does not split into {parts} equal parts of two or more images "
                f"({pluralize(processes, 'process', 'processes')}, [method] bn_groups = {groups}); set "
                f"{_fitting_split(batch, groups, processes)}"
            )


def _fitting_split(batch: int, groups: int, processes: int) -> str:
    """The values of batch_size and of bn_groups that fit best, if the other key stays as it is."""
    parts = processes * local_bn_groups(groups)
    sizes = sorted({max(batch // parts, 2) * parts, max(-(-batch // parts), 2) * parts})
    found = "batch_size = " + " or ".join(map(str, sizes))
    fitting = [
        fewer
        for fewer in range(1, groups)
        if fewer % processes == 0 or processes % fewer == 0
        if batch % (most := max(processes, fewer)) == 0 and batch // most >= 2
    ]
    return found + (f", or [method] bn_groups = {fitting[-1]}" if fitting else "")


def make_train_loader(state: TrainingState, total_steps: int | None = None) -> TrainLoader:
    """Load this process's batches from ``state.step`` to ``total_steps`` (None: to the end of the run)."""
    recipe, accelerator = state.recipe, state.accelerator
    on_cuda = accelerator.device.type == "cuda"
    total_steps = state.last_step if total_steps is None else total_steps
    batches = state.batches(total_steps, rank=accelerator.process_index, world_size=accelerator.num_processes)
    return TrainLoader(
        state.source,
        ViewPipeline(recipe.views, recipe.train.seed),
        batches,
        workers=workers_of(recipe, accelerator),
        pin_memory=on_cuda,
        timeout=recipe.data.worker_timeout,
        upload=Uploader(accelerator.device) if on_cuda else None,
    )
