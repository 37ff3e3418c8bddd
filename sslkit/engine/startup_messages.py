"""What a run says before its first step: model, data, processes, learning rate, weights, and where it continues."""

from pathlib import Path

from sslkit.command_line import free_folder, same_command
from sslkit.data.tools.inspection import describe_alpha
from sslkit.distributed.sharding import local_shard
from sslkit.engine.accelerator import workers_of
from sslkit.engine.checkpoint.format import Checkpoint
from sslkit.engine.checkpoint.retention import checkpoint_name
from sslkit.engine.optim import learning_rate
from sslkit.engine.run_folder.resume import is_of_other_run
from sslkit.engine.state import TrainingState
from sslkit.hub.untrusted import list_names, tensor_shapes
from sslkit.parts.backbone import fresh_tensors, weights_file
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.text import pluralize

LR_RULES = {
    "linear": "scaled by batch size / 256",
    "sqrt": "scaled by the square root of batch size / 256",
    "none": "not scaled with batch size",
}


def startup_messages(state: TrainingState, folder: Path, checkpoint: Checkpoint | None) -> list[str]:
    """The messages of a run in ``folder`` that starts anew or from ``checkpoint``."""
    recipe, accelerator, source = state.recipe, state.accelerator, state.source
    trained = sum(param.numel() for param in state.method.parameters() if param.requires_grad)
    train, num_workers = recipe.train, workers_of(recipe, accelerator)
    processes = pluralize(accelerator.num_processes, "process", "processes")
    messages = [
        *recipe.remarks,
        f"{recipe.method_name} on {recipe.backbone.name}: {trained / 1e6:.2f} M trained parameters",
        f"data {source.description}: {len(source)} images, batch {train.batch_size}, "
        f"{pluralize(train.epochs, 'epoch')}",
        f"{processes}, {accelerator.device.type}, precision {train.precision}, "
        f"{pluralize(num_workers, 'data worker')} each",
        f"learning rate: base {recipe.optim.lr:g}, {LR_RULES[recipe.optim.lr_rule]}, peak {recipe.peak_lr:g}",
    ]
    if accelerator.is_main_process and source.channels is None:
        messages.append(describe_alpha(source))
    if train.compile:
        what = "each block of the backbones" if train.compile == "blocks" else "the backbones"
        messages.append(f"compiling {what}: the first step takes a minute or more")
    if train.shard and accelerator.num_processes > 1:
        params = list(state.method.parameters())
        here, total = sum(local_shard(param).numel() for param in params), sum(param.numel() for param in params)
        messages.append(f"weights of student and teacher sharded: {here} of {total} on this process")
    if streaming := source.describe_streaming(train.batch_size, accelerator.num_processes, num_workers):
        messages.append(streaming)
    if train.micro_batch and has_batch_norm(state.method.backbone) and not recipe.adapt.keeps_statistics:
        slices = train.batch_size // train.micro_batch
        messages.append(
            f"{slices} slices, each with its own BatchNorm statistics, as on {slices} GPUs; in a backbone without "
            "BatchNorm slices change nothing"
        )
    start = _weights(state) if checkpoint is None else [_position(state, folder, checkpoint)]
    return messages + start


def _weights(state: TrainingState) -> list[str]:
    """Which pretrained weights the backbone starts from, and what starts from random weights."""
    config, method = state.recipe.backbone_config(), state.method
    if not config.pretrained:
        return []
    origin = f"timm's of {config.name}" if config.pretrained is True else config.pretrained
    held, fresh = method.backbone.state_dict(), fresh_tensors(config, method.backbone)
    taken = f"{pluralize(len(held) - len(fresh), 'tensor')} taken"
    left_out: list[str] = []
    if (file := weights_file(config)) is not None and held.keys() - set(fresh) <= (
        shapes := tensor_shapes(file)
    ).keys():
        left_out = sorted(shapes.keys() - held.keys())
    unused = f", {len(left_out)} left out ({list_names(left_out)})" if left_out else ""
    teachers = [name for name, each in method.named_children() if isinstance(each, MomentumTeacher)]
    own = [name for name, each in method.named_children() if each is not method.backbone and name not in teachers]
    copies = "; the teacher starts as a copy" if teachers else ""
    return [f"weights {origin}: {taken}{unused}; fresh: {', '.join([*fresh, *own])}{copies}"]


def _position(state: TrainingState, folder: Path, checkpoint: Checkpoint) -> str:
    """From which checkpoint the run continues, and where that is in its schedule."""
    recipe, step, last = state.recipe, state.step, state.last_step
    if step >= last:
        done = f"{folder} is already trained to step {step} of {last}; nothing to do"
        if last < recipe.train.epochs * state.steps_per_epoch:
            return f"{done}. [train] max_steps = {recipe.train.max_steps} ended it; a larger one continues it here"
        overrides = [f"train.epochs={2 * recipe.train.epochs}"]
        command = same_command(output=free_folder(folder), resume=str(folder), overrides=overrides)
        return f"{done}. To train longer, such as twice as long: {command}"
    if not is_of_other_run(checkpoint, folder):
        return f"continuing {folder} from step {step} of {last} (checkpoint {checkpoint_name(step)})"
    epoch, lr = step / state.steps_per_epoch, learning_rate(recipe, step, state.steps_per_epoch)
    return (
        f"starting from {checkpoint.folder}, with its optimizer state. It counts as the first {step} of "
        f"{last} steps: epoch {epoch:.4g} of {recipe.train.epochs} on these images, learning rate "
        f"{lr * state.recovery.lr_factor:.3g} there"
    )
