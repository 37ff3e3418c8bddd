"""From a recipe to a finished run folder: check, set up, continue, train, rewind, close."""

import importlib.metadata
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.distributed.consistency import all_or_none, compare_facts
from sslkit.distributed.failures import explain_nccl, is_others_fault
from sslkit.distributed.heartbeat import Heartbeat
from sslkit.engine.accelerator import make_accelerator, workers_of
from sslkit.engine.checkpoint.format import Checkpoint, restore
from sslkit.engine.checkpoint.retention import checkpoint_name
from sslkit.engine.checkpoint.writer import Saver
from sslkit.engine.logging.logger import RunLogger
from sslkit.engine.logging.sample_images import views_image
from sslkit.engine.logging.trackers import Trackers, check_trackers
from sslkit.engine.loop import RunServices, run_loop
from sslkit.engine.monitor.evaluations import RunMonitor
from sslkit.engine.monitor.knn_monitor import KnnMonitor, check_neighbours, make_knn_monitor
from sslkit.engine.resilience.guard import BadStepError, RewindError
from sslkit.engine.resilience.out_of_memory import (
    OutOfMemoryError,
    explain_evaluation,
    explain_set_up,
    explain_step,
)
from sslkit.engine.resilience.preemption import StopRequest, stop_with_launcher
from sslkit.engine.resilience.rewind import recovery_state_of, reset_training, rewind_checkpoint
from sslkit.engine.run_folder.dataset_identity import BadSamples
from sslkit.engine.run_folder.layout import Run, open_folder
from sslkit.engine.run_folder.lock import hold_folder
from sslkit.engine.run_folder.resume import (
    FREE_KEYS,
    check_folder,
    check_saved_by_run,
    inspect_folder,
    is_of_other_run,
    keep_earlier_defaults,
)
from sslkit.engine.runtime.precision import resolve_precision, restored_backends
from sslkit.engine.setup import build_method, check_steps_left, make_train_loader, set_up_training, steps_per_epoch
from sslkit.engine.startup_messages import startup_messages
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.errors import is_out_of_memory
from sslkit.files.atomic import replace_text
from sslkit.files.run_reader import STOP_MARKER
from sslkit.methods import Method
from sslkit.progress import show_with
from sslkit.recipe.resolve import Recipe, changes
from sslkit.text import pluralize

Advise = Callable[[Recipe, Method, ImageSource], list[str]]


@restored_backends()
@explain_nccl()
def train(recipe: Recipe, output: str | Path, resume: str = "auto", advise: Advise | None = None) -> Run:
    """Pretrain as the recipe says, in a run folder; continue if the folder holds an unfinished run of the recipe.

    Args:
        recipe: What `load_recipe` returned.
        output: Run folder; created if it does not exist.
        resume: ``"auto"`` continues what the folder holds, ``"never"`` refuses to. The path of a checkpoint folder
            starts from that checkpoint.
        advise: Called on the first process at the start of a run; returns messages about the recipe, to be logged.

    Raises:
        UserError: Recipe, data or folder cannot be used as they are. Nothing has been written then.
    """
    folder = Path(output)
    recipe, messages = keep_earlier_defaults(folder, recipe)
    recipe = resolve_precision(recipe)
    check_folder(folder, recipe, resume)  # to refuse early; it is checked again once the folder is locked
    check_trackers(recipe)
    source = open_source(recipe.data).without_labels()
    accelerator = make_accelerator(recipe)
    stop_with_launcher()
    try:
        with StopRequest(recipe.train.max_hours) as stop, ExitStack() as stack:
            lock = hold_folder(folder, active=accelerator.is_main_process)
            messages += all_or_none(lambda: stack.enter_context(lock))
            source, checkpoint, found = all_or_none(partial(inspect_folder, folder, recipe, resume, source))
            state, knn = _prepare(recipe, folder, source, checkpoint, accelerator)
            if advise is not None and accelerator.is_main_process and checkpoint is None:
                found += advise(recipe, state.method, source)
            return _run(state, folder, knn, checkpoint, stop, [*messages, *found])
    finally:
        accelerator.end_training()
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # so that the next run may have another precision


def _prepare(
    recipe: Recipe, folder: Path, source: ImageSource, checkpoint: Checkpoint | None, accelerator: Accelerator
) -> tuple[TrainingState, KnnMonitor | None]:
    """Set up training and its kNN monitor. Mistakes in recipe and data are raised here, before a run is written."""
    if checkpoint is not None and is_of_other_run(checkpoint, folder):
        check_steps_left(recipe, source, checkpoint)
    steps_per_epoch(recipe, source)
    read_or_replace(source, recipe.train.seed, epoch=0, sample=0)  # at least one image can be read
    fixed = [line for line in changes({}, recipe.as_tables()) if not line.startswith(FREE_KEYS)]
    versions = [importlib.metadata.version(name) for name in ("sslkit", "torch", "timm")]
    compare_facts(
        {
            "recipe": fixed,
            "set of images": [len(source), names_digest(source)],
            "checkpoint to continue from": checkpoint.step if checkpoint else None,
            "version of sslkit, torch or timm": versions,
        }
    )
    knn = make_knn_monitor(recipe, accelerator.device, workers_of(recipe, accelerator))
    if knn is not None and checkpoint is None:
        check_neighbours(knn, recipe.monitor.k)
    recovery = recovery_state_of(checkpoint, folder)
    with explain_set_up(accelerator.device):
        state = set_up_training(recipe, source, accelerator, checkpoint=checkpoint, recovery=recovery)
    make_train_loader(state)  # raises if shared memory is too small or read-only; starts no workers
    return state, knn


def _run(
    state: TrainingState,
    folder: Path,
    knn: KnnMonitor | None,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
    messages: list[str],
) -> Run:
    """Open the run folder for writing, train, and close it."""
    recipe, source, active = state.recipe, state.source, state.accelerator.is_main_process
    bad_samples = BadSamples(folder, source, recipe.data.max_bad_share, state.step, active=active)
    # Nothing is refused from here on, and the folder is written to.
    all_or_none(partial(open_folder, folder, recipe, state.accelerator, source))
    bad_samples.drop_later(state.step)
    logger = RunLogger(folder, state.step, active=active)
    for message in [*messages, *startup_messages(state, folder, checkpoint)]:
        logger.log_message(message)
    monitor = RunMonitor(state, logger, knn)
    if active and not state.step:
        monitor.check_data()
    start, back_to = state.step, state.recovery.back_to
    saver = Saver(folder, recipe, state.steps_per_epoch, start, logger.log_message, back_to=back_to, active=active)
    saver.before_save = monitor.finish
    logger.trackers = Trackers(recipe, folder, logger.log_message, active=active)
    with logger.trackers, logger, saver, monitor, show_with(logger.show_stage):
        if checkpoint is not None and state.step >= state.last_step:
            saver.complete(checkpoint)
            return Run(folder, state.step)
        if not state.step:
            logger.log_image("views", 0, partial(views_image, recipe, source))
        with Heartbeat(recipe.guard.timeout_seconds) as heartbeat:
            services = RunServices(folder, logger, saver, monitor, bad_samples, stop, heartbeat)
            reason = _run_with_rewinds(state, services)
        _close(state, services, reason)
    return Run(folder, state.step, reason)


def _run_with_rewinds(state: TrainingState, run: RunServices) -> str:
    """Run the loop, again from the last rewind point as often as ``[guard]`` allows; returns why it was stopped."""
    while True:
        try:
            return run_loop(state, run)
        except RewindError as error:
            run.monitor.finish()
            run.saver.wait()
            state.accelerator.wait_for_everyone()
            _rewind(state, run, str(error))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _explain_memory(state, run, error) from error
            if state.accelerator.num_processes > 1 and is_others_fault(error):
                raise run.heartbeat.blame(error) from error
            raise


def _explain_memory(state: TrainingState, run: RunServices, error: BaseException) -> OutOfMemoryError:
    if run.heartbeat.doing != "evaluating":
        return explain_step(state, error, run.folder)
    knn = run.monitor.knn if run.monitor.knn_is_due(state.step) else None
    return explain_evaluation(state, error, len(knn.pair.train) if knn is not None else None)


def _rewind(state: TrainingState, run: RunServices, reason: str) -> None:
    """Restore the newest rewind point, and take the images in another order from there."""
    recipe, recovery = state.recipe, state.recovery
    if recovery.rewinds >= recipe.guard.max_rewinds:
        times = pluralize(recovery.rewinds, "time")
        raise BadStepError(f"{reason}; the run was rewound {times} before, [guard] max_rewinds allows no more")
    checkpoint = rewind_checkpoint(run.folder, recovery)
    if checkpoint is not None:
        check_saved_by_run(checkpoint, run.folder, recipe)
        restore(checkpoint, state.method, state.optimizer.optimizer, state.accelerator.scaler)
        step, before = checkpoint.step, recovery_state_of(checkpoint, run.folder)
    elif recovery.back_to == 0:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            reset_training(state, build_method(recipe, len(state.source)))
        step, before = 0, RecoveryState()
    else:
        raise BadStepError(f"{reason}; there is no checkpoint yet to go back to")
    lr_factor = recovery.lr_factor * recipe.guard.rewind_lr
    state.step = step
    state.recovery = before.model_copy(update={"rewinds": recovery.rewinds + 1, "lr_factor": lr_factor})
    run.logger.rewind(step)
    run.logger.log_message(f"{reason}; back to step {step}, with another order of the images from there")
    run.saver.rewind(step)


def _close(state: TrainingState, run: RunServices, reason: str) -> None:
    """Log how the run ended, and write a marker for scripts if it was stopped."""
    if reason:
        if state.accelerator.is_main_process:
            try:
                replace_text(run.folder / STOP_MARKER, f"step {state.step}: {reason}\n")
            except OSError as error:
                problem = error.strerror or error
                run.logger.log_message(f"WARNING: {run.folder / STOP_MARKER} could not be written: {problem}")
        run.logger.log_message(f"stopped at step {state.step} by {reason}; the same command continues")
        return
    for kept, why in run.saver.kept().items():
        run.logger.log_message(f"kept {run.folder / 'checkpoints' / checkpoint_name(kept)}: {why}")
    if run.monitor.knn is None:
        run.logger.log_message(
            "whether the encoder beats random weights and raw pixels is not known; a hundred labelled images tell: "
            f"sslkit eval knn {shlex.quote(str(run.folder))} --data DIR"
        )
    run.logger.log_message(f"done: {run.folder} (encoder in {run.folder / 'encoder'})")
