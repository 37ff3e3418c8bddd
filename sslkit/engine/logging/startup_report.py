"""The messages of a run before its first step."""

from pathlib import Path

from sslkit.data.tools.inspection import describe_alpha
from sslkit.distributed.sharding import count_parameters
from sslkit.engine.accelerator import workers_of
from sslkit.engine.state import TrainingState
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.text import pluralize

LR_RULES = {
    "linear": "scaled by batch size / 256",
    "sqrt": "scaled by the square root of batch size / 256",
    "none": "not scaled with batch size",
}


def startup_messages(state: TrainingState, folder: Path) -> list[str]:
    """Model, data, processes, learning rate, and from which step the run in ``folder`` continues."""
    recipe, accelerator, source = state.recipe, state.accelerator, state.source
    trained = sum(param.numel() for param in state.method.parameters() if param.requires_grad)
    train, num_workers = recipe.train, workers_of(recipe, accelerator)
    epochs = pluralize(train.epochs, "epoch")
    processes = pluralize(accelerator.num_processes, "process", "processes")
    workers = pluralize(num_workers, "data worker")
    messages = [
        *recipe.remarks,
        f"{recipe.method_name} on {recipe.backbone.name}: {trained / 1e6:.2f} M trained parameters",
        f"data {source.description}: {len(source)} images, batch {train.batch_size}, {epochs}",
        f"{processes}, {accelerator.device.type}, precision {train.precision}, {workers} each",
        f"learning rate: base {recipe.optim.lr:g}, {LR_RULES[recipe.optim.lr_rule]}, peak {recipe.peak_lr:g}",
    ]
    if accelerator.is_main_process and source.channels is None:
        messages.append(describe_alpha(source))
    if train.shard and accelerator.num_processes > 1:
        here, total = count_parameters(state.method)
        messages.append(f"weights of student and teacher sharded: {here} of {total} on this process")
    if streaming := source.describe_streaming(train.batch_size, accelerator.num_processes, num_workers):
        messages.append(streaming)
    if train.micro_batch and has_batch_norm(state.method.backbone):
        slices = train.batch_size // train.micro_batch
        messages.append(
            f"{slices} slices, each with its own BatchNorm statistics, as on {slices} GPUs; in a backbone without "
            "BatchNorm slices change nothing"
        )
    if state.step >= state.last_step:
        messages.append(f"{folder} is already trained to step {state.step} of {state.last_step}; nothing to do")
    elif state.step:
        messages.append(f"continuing {folder} from step {state.step} of {state.last_step}")
    return messages
