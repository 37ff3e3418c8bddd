"""Compute a bad step again from its crash dump: whether the numbers are the same, and where they went wrong."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sslkit.data.sources.image_source import open_source
from sslkit.engine.resilience.crash_dump import read_crash_dump
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.setup import make_train_loader, set_up_training
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.engine.step import train_step
from sslkit.errors import UserError, check_path
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe


@dataclass(frozen=True)
class Replay:
    """A step computed again.

    Attributes:
        step: Number of the step, from 0.
        complaint: Why it was refused.
        then: Its loss and gradient norm at that time.
        now: The same, computed again.
        culprit: The first module whose output is not finite; empty if all are finite.
        bad_samples: Images whose rows in that output are not finite.
        bad_gradients: Parameters whose gradient is not finite, in their order.
        remarks: How the two computations differ.
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
        """Whether both numbers are the same, bit for bit; NaN equals NaN."""
        return all(repr(self.then[name]) == repr(self.now[name]) for name in self.then)


def replay_step(folder: str | Path) -> Replay:
    """Compute the step of a crash dump again, on the CPU and in one process.

    Raises:
        UserError: The folder is no crash dump, it is damaged, or its images have changed.
    """
    check_path(folder, "CAPSULE")
    facts, weights = read_crash_dump(Path(folder))
    recipe = build_recipe(as_saved(facts["recipe"]), name=f"{folder}/capsule.json")
    source = open_source(recipe.data).without_labels()
    if len(source) != facts["images"]:
        raise UserError(f"{folder}: was made with {facts['images']} images; {source.description} has {len(source)} now")
    remarks = _differences(facts, recipe)
    recipe = _for_replay(recipe)
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.train.precision)
    try:
        state = set_up_training(recipe, source, accelerator, recovery=RecoveryState(rewinds=facts["detour"]))
        state.method.load_state_dict(weights)
        state.step = facts["step"]
        return _compute(state, facts, remarks)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(f"{folder}: the weights do not fit the recipe: {str(error).splitlines()[-1]}") from error
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _for_replay(recipe: Recipe) -> Recipe:
    """The recipe for one process on a CPU, with gradients as they were before clipping."""
    precision = "no" if recipe.train.precision == "fp16" else recipe.train.precision
    train = {"precision": precision, "compile": False, "clip_norm": 0.0}
    return replace(
        recipe,
        train=recipe.train.model_copy(update=train),
        data=recipe.data.model_copy(update={"workers": 0}),
    )


def _differences(facts: dict[str, Any], recipe: Recipe) -> list[str]:
    """What may make the numbers differ from those of the run."""
    remarks = []
    if facts["device"] != "cpu":
        remarks.append(f"the run computed it on {facts['device']}; the last digits differ on a CPU")
    if facts["processes"] > 1:
        remarks.append(f"{facts['processes']} processes computed it, each with its own dropout and order of sums")
    if facts["torch"] != torch.__version__:
        remarks.append(f"torch was {facts['torch']} and is {torch.__version__}")
    if recipe.train.precision == "fp16":
        remarks.append("the precision was fp16, with a loss scale; a CPU computes in float32")
    return remarks


def _compute(state: TrainingState, facts: dict[str, Any], remarks: list[str]) -> Replay:
    """Make the step, and look for the first numbers that are not finite."""
    state.method.train()
    first_bad = FirstBadOutput(state.method)
    batch = next(iter(make_train_loader(state, state.step + 1)))
    result = train_step(state, batch, Guard(state.recipe.guard, state.recovery, state.method))
    grads = {name: param.grad for name, param in state.method.named_parameters() if param.grad is not None}
    sample_ids = batch.sample_ids.tolist()
    return Replay(
        result.step,
        str(facts["complaint"]),
        {"loss": float(facts["loss"]), "grad_norm": float(facts["grad_norm"])},
        {"loss": result.loss, "grad_norm": result.grad_norm},
        first_bad.name,
        [sample_ids[row] for row in first_bad.rows if row < len(sample_ids)],
        [name for name, grad in grads.items() if not torch.isfinite(grad).all()],
        remarks,
    )


class FirstBadOutput:
    """Hooks that find the first module whose output is not finite, and the rows of it that are not.

    Attributes:
        name: The module; empty if all outputs are finite.
        rows: Rows of its output.
    """

    def __init__(self, method: nn.Module) -> None:
        self.name, self.rows = "", list[int]()
        for name, module in method.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.name or not isinstance(output, Tensor) or torch.isfinite(output).all():
                return
            self.name = name
            if output.ndim > 1:
                finite = torch.isfinite(output.flatten(1)).all(dim=1)
                self.rows = torch.nonzero(~finite).flatten().tolist()

        return check
