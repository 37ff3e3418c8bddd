"""From a recipe to a finished run folder: check, build, resume, train."""

import importlib.metadata
import os
from contextlib import ExitStack
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.loading.loader import GlobalBatches, cores_of_a_process
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.loading.worker_pool import SteadyLoader
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.distributed.consistency import all_or_none, compare_facts
from sslkit.distributed.heartbeat import Heartbeat, is_others_fault
from sslkit.distributed.sharding import shard
from sslkit.engine.accelerator import make_accelerator, processes_here, workers_of
from sslkit.engine.checkpoint.format import Checkpoint, restore
from sslkit.engine.checkpoint.retention import checkpoint_name
from sslkit.engine.checkpoint.writer import Saver
from sslkit.engine.encoders import compile_backbones, encoders_of
from sslkit.engine.logging.logger import Journal
from sslkit.engine.logging.sample_images import view_sheet
from sslkit.engine.logging.startup_report import opening_lines
from sslkit.engine.logging.trackers import Tracks, check_trackers
from sslkit.engine.loop import run_loop
from sslkit.engine.monitor.alarms import data_alarm
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.engine.monitor.image_variety import look_for_variety
from sslkit.engine.monitor.knn_monitor import KnnMonitor, check_neighbours, preprocessing_of
from sslkit.engine.optim import make_optimizer
from sslkit.engine.resilience.guard import BadStepError, Course, RewindError
from sslkit.engine.resilience.preemption import MARKER, StopRequest, die_with_launcher, leave_marker
from sslkit.engine.resilience.rewind import course_of, rewind_checkpoint, start_again
from sslkit.engine.run_folder.dataset_identity import BadSamples
from sslkit.engine.run_folder.layout import (
    FREE_KEYS,
    Run,
    as_begun,
    check_folder,
    check_own,
    look_into,
    open_folder,
)
from sslkit.engine.run_folder.lock import hold_folder
from sslkit.engine.state import Training
from sslkit.errors import UserError
from sslkit.evaluate.features.transforms import evaluation_transform
from sslkit.methods import Method, find_method
from sslkit.methods.base import local_bn_groups
from sslkit.parts.backbone import create_backbone, feature_dim, recompute_activations
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.recipe.resolve import Recipe, changes


def train(recipe: Recipe, output: str | Path, resume: str = "auto") -> Run:
    """Pretrain as the recipe says, in a run folder; continue where an earlier start of it stopped.

    Args:
        recipe: What `load_recipe` returned.
        output: Run folder; created if it is not there.
        resume: ``"auto"`` continues what the folder holds, ``"never"`` refuses to, or the path of a checkpoint
            folder to start from.

    Raises:
        UserError: Something in recipe, data or folder is not as it must be. Nothing has been written then.
    """
    folder = Path(output)
    recipe, begun = as_begun(folder, recipe)
    check_folder(folder, recipe, resume)  # to refuse early; it counts once the folder is held
    check_trackers(recipe)
    source = open_source(recipe.data).without_labels()
    accelerator = make_accelerator(recipe)
    die_with_launcher()
    try:
        with StopRequest(recipe.train.max_hours) as stop, ExitStack() as held:
            lock = hold_folder(folder, active=accelerator.is_main_process)
            said = [*begun, *all_or_none(lambda: held.enter_context(lock))]
            return _train(recipe, folder, resume, source, accelerator, stop, said)
    finally:
        accelerator.end_training()
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # so that the next run may have another precision


def _train(
    recipe: Recipe,
    folder: Path,
    resume: str,
    source: ImageSource,
    accelerator: Accelerator,
    stop: StopRequest,
    said: list[str],
) -> Run:
    """Look at a folder that is held, build what it and the recipe ask for, and only then write and train."""
    found = all_or_none(lambda: look_into(folder, recipe, resume, source))
    source, checkpoint = found.source, found.checkpoint
    epoch_steps = steps_per_epoch(recipe, source)
    read_or_replace(source, recipe.train.seed, epoch=0, sample=0)  # images can be read at all
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, len(source))
    check_groups(recipe, method, accelerator.num_processes)
    monitor = make_monitor(recipe, accelerator)
    if monitor is not None and checkpoint is None:
        check_neighbours(monitor, recipe.monitor.k)
    compare_facts(_facts(recipe, source, checkpoint), accelerator.device)
    last_step = _last_step(recipe, epoch_steps)
    training = assemble(recipe, folder, accelerator, method, source, checkpoint, epoch_steps, last_step, monitor)
    # All that can be refused has been: from here on the folder is written to.
    first = accelerator.is_main_process
    all_or_none(partial(open_folder, folder, recipe, accelerator, source))
    training.bad_samples.drop_later(training.start_step)
    journal = Journal(folder, training.start_step, active=first)
    for sentence in [*said, *found.remarks, *opening_lines(training, source)]:
        journal.say(sentence)
    if first and not training.start_step:
        alarms = data_alarm(*astuple(look_for_variety(source, recipe.train.seed)))
        journal.warn(alarms, 0)
        if training.diagnostics:
            training.diagnostics.of_data = alarms
    start, back_to = training.start_step, training.course.back_to
    saver = Saver(folder, recipe, epoch_steps, start, journal.say, back_to=back_to, active=first)
    tracks = journal.tracks = Tracks(recipe, folder, journal.say, active=first)
    with tracks, journal, saver:
        if checkpoint is not None and training.start_step >= last_step:
            saver.complete(training.start_step, checkpoint.model)
            return Run(folder, training.start_step)
        if tracks.shows_pictures and not training.start_step:
            journal.picture("views", 0, partial(view_sheet, recipe, source))
        with Heartbeat(recipe.guard.timeout_seconds) as heart:
            step, reason = _run_through(training, source, journal, saver, stop, heart)
        _close(training, journal, saver, step, reason)
    return Run(folder, step, reason)


def _close(training: Training, journal: Journal, saver: Saver, step: int, reason: str) -> None:
    """Say how the run ended, and leave a mark for scripts if it was stopped."""
    folder = training.folder
    if reason:
        if training.accelerator.is_main_process:
            try:
                leave_marker(folder, step, reason)
            except OSError as error:
                journal.say(f"WARNING: {folder / MARKER} could not be written: {error.strerror or error}")
        journal.say(f"stopped at step {step} by {reason}; the same command continues")
        return
    for kept, why in saver.kept().items():
        journal.say(f"kept {folder / 'checkpoints' / checkpoint_name(kept)}: {why}")
    journal.say(f"done: {folder} (encoder in {folder / 'encoder'})")


def _facts(recipe: Recipe, source: ImageSource, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What must be the same on all processes before a step is made."""
    kept = [line for line in changes({}, recipe.as_tables()) if not line.startswith(FREE_KEYS)]
    return {
        "recipe": kept,
        "set of images": [len(source), names_digest(source)],
        "checkpoint to continue from": checkpoint.step if checkpoint else None,
        "version of sslkit, torch or timm": [importlib.metadata.version(name) for name in ("sslkit", "torch", "timm")],
    }


def _run_through(
    training: Training, source: ImageSource, journal: Journal, saver: Saver, stop: StopRequest, heart: Heartbeat
) -> tuple[int, str]:
    """The loop, begun again from the last checkpoint as often as ``[guard]`` allows."""
    while True:
        try:
            return run_loop(training, journal, saver, stop, heart)
        except RewindError as error:
            saver.wait()
            training.accelerator.wait_for_everyone()
            training = _go_back(training, source, journal, str(error))
            saver.go_back(training.start_step)
        except RuntimeError as error:
            if training.accelerator.num_processes > 1 and is_others_fault(error):
                raise heart.blame(error) from error
            raise


def _restore_scaler(accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """The loss scale, where there is one now and was one then."""
    if accelerator.scaler is not None and (state := checkpoint.state.get("scaler")):
        accelerator.scaler.load_state_dict(state)


def _go_back(training: Training, source: ImageSource, journal: Journal, why: str) -> Training:
    """The same training as at its newest rewind point, with another order of the images from there."""
    config, course = training.recipe.guard, training.course
    if course.rewinds >= config.max_rewinds:
        raise BadStepError(f"{why}; went back {course.rewinds} time(s) before, [guard] max_rewinds allows no more")
    checkpoint = rewind_checkpoint(training.folder, course)
    if checkpoint is not None:
        check_own(checkpoint, training.folder, training.recipe)
        step, before = checkpoint.step, course_of(checkpoint, training.folder)
        restore(checkpoint, training.method, training.optimizer.optimizer)
        _restore_scaler(training.accelerator, checkpoint)
    elif course.back_to == 0:
        step, before = 0, Course()
        start_again(training, build_method)
    else:
        raise BadStepError(f"{why}; there is no checkpoint yet to go back to")
    course = replace(before, rewinds=course.rewinds + 1, lr_factor=course.lr_factor * config.rewind_lr)
    journal.go_back(step)
    journal.say(f"{why}; back to step {step}, with another order of the images from there")
    loader = _make_loader(training.recipe, training.accelerator, source, step, training.last_step, course.rewinds)
    return replace(training, start_step=step, course=course, loader=loader)


def _make_loader(
    recipe: Recipe, accelerator: Accelerator, source: ImageSource, start_step: int, last_step: int, detour: int
) -> SteadyLoader:
    batches = GlobalBatches(
        len(source),
        recipe.train.batch_size,
        recipe.train.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=start_step,
        total_steps=last_step,
        detour=detour,
        plan=source.plan,
    )
    return SteadyLoader(
        source,
        ViewPipeline(recipe.views, recipe.train.seed),
        batches,
        workers=workers_of(recipe, accelerator),
        pin_memory=accelerator.device.type == "cuda",
        timeout=recipe.data.worker_timeout,
    )


def build_method(recipe: Recipe, num_samples: int = 0) -> Method:
    """The recipe's method on its backbone, on the CPU, initialised from torch's current random state.

    Args:
        recipe: What to build.
        num_samples: Images of the data: the rows of a memory bank.

    Raises:
        UserError: More memory is asked for than there is.
    """
    spec = recipe.backbone_spec()
    backbone = create_backbone(spec)
    width = feature_dim(backbone, recipe.views.size, channels=spec.channels)
    if recipe.views.small_crops:
        feature_dim(backbone, recipe.views.small_size, "small_size", spec.channels)
    try:
        method = find_method(recipe.method_name)(backbone, width, recipe.method)
        method.meet_data(num_samples)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise UserError(
            "[method]: this machine has not the memory for heads, queue or bank of this size; take smaller ones"
        ) from error
    if recipe.train.activation_checkpointing:
        recompute_activations(method.backbone, recipe.backbone.name)
    if recipe.train.micro_batch and has_batch_norm(backbone):
        # A slice can only have batch statistics of its own, whatever process it lies on.
        method.bn_groups = max(recipe.train.batch_size // recipe.train.micro_batch, method.bn_groups)
    return method


def assemble(
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    method: Method,
    source: ImageSource,
    checkpoint: Checkpoint | None,
    steps_per_epoch: int,
    last_step: int,
    monitor: KnnMonitor | None,
) -> Training:
    """Wire method, optimizer and loader to the processes, and put the checkpoint in."""
    if accelerator.num_processes > 1 and has_batch_norm(method):
        method.synchronise_batch_norm(accelerator.device)
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A thread that finds its core taken by a data worker holds up all the others.
        torch.set_num_threads(max(cores_of_a_process(processes_here()) - workers_of(recipe, accelerator), 1))
    # FSDP2 takes contiguous parameters only.
    memory_format = torch.contiguous_format if recipe.train.shard else torch.channels_last
    method.to(accelerator.device, memory_format=memory_format)  # type: ignore[call-overload]
    if recipe.train.compile:
        compile_backbones(method)
    if recipe.train.shard:
        shard(method, encoders_of(method), accelerator.device)
    optimizer = make_optimizer(recipe, method)
    if checkpoint is not None:
        restore(checkpoint, method, optimizer)
    # Sharded, the method reduces its gradients itself; Accelerate adds mixed precision and no DDP.
    wrapped = accelerator.prepare_model(method, evaluation_mode=recipe.train.shard)
    prepared = accelerator.prepare_optimizer(optimizer)
    if checkpoint is not None:
        _restore_scaler(accelerator, checkpoint)
    start_step = checkpoint.step if checkpoint else 0
    course = course_of(checkpoint, folder)
    return Training(
        recipe,
        folder,
        accelerator,
        method,
        wrapped,
        prepared,
        _make_loader(recipe, accelerator, source, start_step, last_step, course.rewinds),
        len(source),
        steps_per_epoch,
        start_step,
        last_step,
        monitor,
        Diagnostics(recipe, source, accelerator) if recipe.monitor.diagnose_every else None,
        course,
        BadSamples(folder, source, recipe.data.max_bad_share, start_step, active=accelerator.is_main_process),
        source.plan,
    )


def make_monitor(recipe: Recipe, accelerator: Accelerator) -> KnnMonitor | None:
    """The kNN that the recipe's ``[monitor]`` asks for, or None."""
    if not recipe.monitor.every_epochs:
        return None
    transform = evaluation_transform(preprocessing_of(recipe.views))
    return KnnMonitor(recipe, transform, accelerator.device, workers_of(recipe, accelerator))


def steps_per_epoch(recipe: Recipe, source: ImageSource) -> int:
    """Whole batches in an epoch; the rest of the images wait for the next one's order.

    Raises:
        UserError: Not even one.
    """
    if recipe.train.batch_size > len(source):
        raise UserError(
            f"[train] batch_size: {recipe.train.batch_size} is more than the {len(source)} images of "
            f"{source.description}; take at most that many"
        )
    return len(source) // recipe.train.batch_size


def _last_step(recipe: Recipe, steps_per_epoch: int) -> int:
    total = recipe.train.epochs * steps_per_epoch
    return min(recipe.train.max_steps or total, total)


def check_groups(recipe: Recipe, method: Method, processes: int) -> None:
    """`check_batch` for every part of a method that has BN groups of its own."""
    for groups in dict.fromkeys(method.batch_norm_groups().values()):
        check_batch(recipe, groups, processes, across=method.groups_across_processes)


def check_batch(recipe: Recipe, groups: int, processes: int, *, across: bool = False) -> None:
    """See that the global batch falls into equal parts for processes, for their BN groups and for slices.

    A group may span processes if ``across`` says so.

    Raises:
        UserError: It does not.
    """
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    if micro and batch % (processes * micro):
        raise UserError(
            f"[train] micro_batch: {micro} does not divide the {batch / processes:g} images of each process's part of "
            f"[train] batch_size = {batch}; take a divisor"
        )
    parts = processes * local_bn_groups(groups)
    if (processes < groups and groups % processes) or (across and groups < processes and processes % groups):
        raise UserError(f"[method] bn_groups: {groups} groups cannot be shared by {processes} processes")
    if batch % parts or batch // parts < 2:
        raise UserError(
            f"[train] batch_size: {batch} does not fall into {parts} equal parts of two or more images "
            f"({processes} processes, [method] bn_groups = {groups})"
        )
