"""What a run says before its first step."""

from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.inspection import describe_alpha
from sslkit.distributed.sharding import held_here
from sslkit.engine.accelerator import workers_of
from sslkit.engine.state import Training
from sslkit.errors import counted
from sslkit.parts.batchnorm import has_batch_norm


def opening_lines(training: Training, source: ImageSource) -> list[str]:
    """What the user is told before the first step."""
    recipe, accelerator = training.recipe, training.accelerator
    trained = sum(param.numel() for param in training.method.parameters() if param.requires_grad)
    train = recipe.train
    lines = [
        *recipe.remarks,
        f"{recipe.method_name} on {recipe.backbone.name}: {trained / 1e6:.2f} M trained parameters",
        f"data {source.description}: {len(source)} images, batch {train.batch_size}, {train.epochs} epochs",
        f"{counted(accelerator.num_processes, 'process', 'processes')}, {accelerator.device.type}, "
        f"precision {train.precision}, {counted(workers_of(recipe, accelerator), 'data worker')} each",
        f"learning rate: base {recipe.optim.lr:g}, rule {recipe.optim.lr_rule} x batch / 256, peak {recipe.peak_lr:g}",
    ]
    if accelerator.is_main_process and source.channels is None:
        lines.append(describe_alpha(source))
    if train.shard and accelerator.num_processes > 1:
        here, there = held_here(training.method)
        lines.append(f"weights of student and teacher in parts: {here} of {there} on this process")
    workers = workers_of(recipe, accelerator)
    if streaming := source.describe_streaming(train.batch_size, accelerator.num_processes, workers):
        lines.append(streaming)
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
