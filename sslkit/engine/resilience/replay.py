"""Compute a bad step again from its capsule: the same numbers, and where they went wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.gpu import finish_on
from sslkit.data.loading.loader import Batch, make_loader
from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.engine.loop import forward_and_backward
from sslkit.engine.resilience.crash_dump import batches_of, read_capsule
from sslkit.engine.setup import build_method
from sslkit.errors import UserError, check_path
from sslkit.methods import Method, Progress
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe


@dataclass(frozen=True)
class Replay:
    """A step computed again.

    Attributes:
        step: Which.
        complaint: What was said of it then.
        then: Its loss and gradient norm then.
        now: The same, computed again.
        culprit: The first module whose output is not finite; empty if all are.
        bad_samples: Images whose features are not finite.
        bad_gradients: Parameters whose gradient is not finite, in order.
        remarks: In what the two computations differ.
    """

    step: int
    complaint: str
    then: dict[str, float]
    now: dict[str, float]
    culprit: str
    bad_samples: list[int]
    bad_gradients: list[str]
    remarks: list[str]

    @property
    def same(self) -> bool:
        """Whether both numbers are the same, bit for bit; what is not a number equals its like."""
        return all(repr(self.then[name]) == repr(self.now[name]) for name in self.then)


def replay_capsule(folder: str | Path) -> Replay:
    """Compute a capsule's step again, on the CPU and in one process.

    Raises:
        UserError: It is no capsule, it is torn, or its images are not there as they were.
    """
    check_path(folder, "CAPSULE")
    facts, weights = read_capsule(Path(folder))
    recipe = build_recipe(as_saved(facts["recipe"]), name=f"{folder}/capsule.json")
    source = open_source(recipe.data).without_labels()
    if len(source) != facts["images"]:
        raise UserError(f"{folder}: was made with {facts['images']} images; {source.description} has {len(source)} now")
    remarks = _remarks(facts, recipe)
    method = build_method(recipe, len(source))
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights that do not fit their recipe: {str(error).splitlines()[-1]}") from error
    batch = _cut_again(recipe, source, facts)
    precision = "no" if recipe.train.precision == "fp16" else recipe.train.precision
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    try:
        return _compute(recipe, accelerator, method, batch, facts, remarks)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _remarks(facts: dict[str, Any], recipe: Recipe) -> list[str]:
    remarks = []
    if facts["device"] != "cpu":
        remarks.append(f"it was computed on {facts['device']}; the last digits differ on a CPU")
    if facts["processes"] > 1:
        remarks.append(f"{facts['processes']} processes computed it, each with dropout and sums of its own")
    if facts["torch"] != torch.__version__:
        remarks.append(f"torch was {facts['torch']} and is {torch.__version__}")
    if recipe.train.precision == "fp16":
        remarks.append("precision was fp16, with a loss scale; a CPU computes in float32")
    return remarks


def _cut_again(recipe: Recipe, source: ImageSource, facts: dict[str, Any]) -> Batch:
    batches = batches_of(recipe, facts["detour"], facts["step"], facts["images"], source.plan)
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    batch: Batch = next(iter(make_loader(source, pipeline, batches, workers=0, pin_memory=False)))
    return batch


def _compute(
    recipe: Recipe,
    accelerator: Accelerator,
    method: Method,
    batch: Batch,
    facts: dict[str, Any],
    remarks: list[str],
) -> Replay:
    method.to(memory_format=torch.channels_last)
    method.train()
    wrapped = accelerator.prepare_model(method)
    watch = FirstBadOutput(method)
    batch = finish_on(accelerator.device, batch, recipe.views)
    steps = facts["images"] // recipe.train.batch_size
    position = Progress(facts["step"], recipe.train.epochs * steps, steps, recipe.train.batch_size)
    result = forward_and_backward(recipe, accelerator, method, wrapped, batch, position)
    grads = {name: param.grad for name, param in method.named_parameters() if param.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(grads.values())))
    return Replay(
        facts["step"],
        str(facts["complaint"]),
        {"loss": float(facts["loss"]), "grad_norm": float(facts["grad_norm"])},
        {"loss": float(result.loss.detach()), "grad_norm": norm},
        watch.name,
        [int(batch.sample_ids[row]) for row in watch.rows if row < len(batch.sample_ids)],
        [name for name, grad in grads.items() if not torch.isfinite(grad).all()],
        remarks,
    )


class FirstBadOutput:
    """Notes the first module whose output is not finite, and the rows in which it is not."""

    def __init__(self, method: nn.Module) -> None:
        self.name, self.rows = "", list[int]()
        for name, module in method.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.name or not isinstance(output, Tensor) or torch.isfinite(output).all():
                return
            self.name = name
            self.rows = _rows_not_finite(output)

        return look


def _rows_not_finite(output: Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(output.flatten(1)).all(dim=1)).flatten().tolist() if output.ndim > 1 else []
