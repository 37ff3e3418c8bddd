"""From a recipe to a finished run folder: check, build, resume, train."""

import importlib.metadata
import os
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import create_transform

from sslkit.data.loader import GlobalBatches, cores_of_a_process, make_loader, resolve_workers
from sslkit.data.source import ImageSource, open_source
from sslkit.data.views import ViewPipeline
from sslkit.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, restore
from sslkit.engine.diagnostics import Diagnostics
from sslkit.engine.journal import Journal, read_lines
from sslkit.engine.loop import Training, run_loop
from sslkit.engine.monitors import KnnMonitor
from sslkit.engine.optim import make_optimizer
from sslkit.engine.processes import make_accelerator
from sslkit.errors import UserError
from sslkit.methods import Method, find_method
from sslkit.methods.base import local_bn_groups
from sslkit.parts.backbone import create_backbone, feature_dim
from sslkit.parts.batchnorm import has_batch_norm, synchronise_batch_norm
from sslkit.recipe import Recipe, changes

BACKBONES = ("backbone", "teacher_backbone")
# Keys that do not change what is learned; a run may be continued with others.
FREE_KEYS = (
    *("data.workers", "train.max_steps", "train.processes", "train.log_every"),
    *("monitor.diagnose_every", "checkpoint.", "reference."),
)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Where it lies.
        step: Updates made.
    """

    folder: Path
    step: int

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def results(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl."""
        return read_lines(self.folder / "results.jsonl")


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
    _check_folder(folder, recipe, resume)
    source = open_source(recipe.data).without_labels()
    epoch_steps = steps_per_epoch(recipe, source)
    source.read(0)
    accelerator = make_accelerator(recipe)
    try:
        return _train(recipe, folder, resume, source, epoch_steps, accelerator)
    finally:
        accelerator.end_training()
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # so that the next run may have another precision


def _train(
    recipe: Recipe, folder: Path, resume: str, source: ImageSource, steps_per_epoch: int, accelerator: Accelerator
) -> Run:
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, len(source))
    check_batch(recipe, method.bn_groups, accelerator.num_processes)
    monitor = make_monitor(recipe, accelerator)
    checkpoint, complaints = _find_checkpoint(folder, recipe, resume)
    last_step = _last_step(recipe, steps_per_epoch)
    training = _assemble(recipe, folder, accelerator, method, source, checkpoint, steps_per_epoch, last_step, monitor)
    # All that can be refused has been: from here on the folder is written to.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _open_folder(folder, recipe, accelerator)
    journal = Journal(folder, training.start_step, active=accelerator.is_main_process)
    for sentence in [*complaints, *_opening(training, source)]:
        journal.say(sentence)
    with journal:
        if training.start_step < last_step:
            run_loop(training, journal)
            journal.say(f"done: {folder} (encoder in {folder / 'encoder'})")
    return Run(folder, max(training.start_step, last_step))


def build_method(recipe: Recipe, num_samples: int = 0) -> Method:
    """The recipe's method on its backbone, on the CPU, initialised from torch's current random state.

    Args:
        recipe: What to build.
        num_samples: Images of the data: the rows of a memory bank.
    """
    spec = recipe.backbone_spec()
    backbone = create_backbone(spec)
    width = feature_dim(backbone, recipe.views.size)
    if recipe.views.small_crops:
        feature_dim(backbone, recipe.views.small_size, key="small_size")
    method = find_method(recipe.method_name)(backbone, width, recipe.method)
    method.meet_data(num_samples)
    if recipe.train.micro_batch and has_batch_norm(backbone):
        # A slice can only have batch statistics of its own, whatever process it lies on.
        method.bn_groups = max(recipe.train.batch_size // recipe.train.micro_batch, method.bn_groups)
    return method


def _assemble(
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
        synchronise_batch_norm(method, accelerator.device, spare=BACKBONES if method.bn_groups > 1 else ())
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A thread that finds its core taken by a data worker holds up all the others.
        torch.set_num_threads(max(cores_of_a_process(_processes_here()) - _workers(recipe, accelerator), 1))
    method.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, method)
    if checkpoint is not None:
        restore(checkpoint, method, optimizer)
    wrapped, prepared = accelerator.prepare(method, optimizer)
    if checkpoint is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    start_step = checkpoint.step if checkpoint else 0
    batches = GlobalBatches(
        len(source),
        recipe.train.batch_size,
        recipe.train.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=start_step,
        total_steps=last_step,
    )
    loader = make_loader(
        source,
        ViewPipeline(recipe.views, recipe.train.seed),
        batches,
        workers=_workers(recipe, accelerator),
        pin_memory=accelerator.device.type == "cuda",
    )
    return Training(
        recipe,
        folder,
        accelerator,
        method,
        wrapped,
        prepared,
        loader,
        steps_per_epoch,
        start_step,
        last_step,
        monitor,
        Diagnostics(recipe, source, accelerator) if recipe.monitor.diagnose_every else None,
    )


def _workers(recipe: Recipe, accelerator: Accelerator) -> int:
    return resolve_workers(
        recipe.data.workers, on_accelerator=accelerator.device.type != "cpu", processes_here=_processes_here()
    )


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_monitor(recipe: Recipe, accelerator: Accelerator) -> KnnMonitor | None:
    """The kNN that the recipe's ``[monitor]`` asks for, or None."""
    if not recipe.monitor.every_epochs:
        return None
    views = recipe.views
    transform = create_transform(
        (3, views.size, views.size),
        is_training=False,
        interpolation=views.interpolation,
        mean=views.mean,
        std=views.std,
        crop_pct=views.crop_pct,
    )
    return KnnMonitor(recipe, transform, accelerator.device, _workers(recipe, accelerator))


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


def check_batch(recipe: Recipe, groups: int, processes: int) -> None:
    """See that the global batch falls into equal parts for processes, for their BN groups and for slices.

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
    if processes < groups and groups % processes:
        raise UserError(f"[method] bn_groups: {groups} groups cannot be shared by {processes} processes")
    if batch % parts or batch // parts < 2:
        raise UserError(
            f"[train] batch_size: {batch} does not fall into {parts} equal parts of two or more images "
            f"({processes} processes, [method] bn_groups = {groups})"
        )


def _check_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse a folder that is not ours to write to, before anything is written."""
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        filled = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {folder}: {existing} is not a folder that can be written to")
    if not filled:
        return
    saved = folder / "recipe.toml"
    if not saved.is_file():
        raise UserError(f"--output {folder}: holds something that is not a run; choose a new or empty folder")
    if resume == "never":
        raise UserError(f"--output {folder}: already holds a run; --resume never needs a new or empty folder")
    try:
        before = tomllib.loads(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{saved}: not a readable recipe, so this run cannot be continued: {error}") from error
    changed = [line for line in changes(before, recipe.as_tables()) if not line.startswith(FREE_KEYS)]
    if changed:
        raise UserError(
            f"--output {folder}: holds a run of another recipe; choose another folder or undo: " + "; ".join(changed)
        )


def _find_checkpoint(folder: Path, recipe: Recipe, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, if any, and a sentence for each broken one passed over."""
    if resume in ("auto", "never"):
        return newest_checkpoint(folder / "checkpoints")
    path = Path(resume)
    complaints: list[str] = []
    if (path / "manifest.json").is_file():
        checkpoint = read_checkpoint(path)
    else:
        found, complaints = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if found is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run or checkpoint folder, auto or never")
        checkpoint = found
    differing = changes(checkpoint.state["recipe"], recipe.as_tables())
    unfit = [line for line in differing if line.startswith(("method.", "backbone.", "optim.name", "optim.exclude"))]
    if unfit:
        raise UserError(f"--resume {resume}: was trained by another recipe, which must agree in: {'; '.join(unfit)}")
    return checkpoint, complaints


def _open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator) -> None:
    """Create the run folder and write its recipe, whole or not at all."""
    versions = {name: importlib.metadata.version(name) for name in ("sslkit", "torch", "timm", "accelerate")}
    header = "".join(f"# {name} {version}\n" for name, version in versions.items())
    header += f"# Python {platform.python_version()}, {platform.platform()}\n"
    header += f"# processes {accelerator.num_processes}, {accelerator.device.type}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".recipe.tmp"
        aside.write_text(f"{header}\n{recipe.to_toml()}", encoding="utf-8")
        aside.replace(folder / "recipe.toml")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error}") from error


def _opening(training: Training, source: ImageSource) -> list[str]:
    """What the user is told before the first step."""
    recipe, accelerator = training.recipe, training.accelerator
    trained = sum(param.numel() for param in training.method.parameters() if param.requires_grad)
    train = recipe.train
    lines = [
        f"{recipe.method_name} on {recipe.backbone.name}: {trained / 1e6:.2f} M trained parameters",
        f"data {source.description}: {len(source)} images, batch {train.batch_size}, {train.epochs} epochs",
        f"{accelerator.num_processes} process(es), {accelerator.device.type}, precision {train.precision}, "
        f"{_workers(recipe, accelerator)} data worker(s) each",
        f"learning rate: base {recipe.optim.lr:g}, rule {recipe.optim.lr_rule} x batch / 256, peak {recipe.peak_lr:g}",
    ]
    if train.micro_batch and has_batch_norm(training.method.backbone):
        slices = train.batch_size // train.micro_batch
        lines.append(
            f"{slices} slices, each with BatchNorm statistics of its own, as {slices} GPUs would have; slices change "
            "nothing in a backbone without BatchNorm"
        )
    done, last = training.start_step, training.last_step
    if done >= last:
        lines.append(f"{training.folder} is already trained to step {done} of {last}; nothing to do")
    elif done:
        lines.append(f"continuing {training.folder} from step {done} of {last}")
    return lines
