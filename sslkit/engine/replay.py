"""Compute a bad step again from its crash dump: whether the numbers are the same, and where they went wrong."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sslkit.data.sources.image_source import open_source
from sslkit.engine.resilience.crash_dump import CrashFacts, read_crash_dump
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.setup import make_train_loader, set_up_training
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.engine.step import train_step
from sslkit.errors import UserError, check_path
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe


@dataclass(frozen=True)
class Replay:
    """A step computed again."""

    step: int  # from 0
    complaint: str  # why it was refused
    then: dict[str, float]  # its loss and gradient norm at that time
    now: dict[str, float]  # the same, computed again
    culprit: str  # the first module whose output is not finite; empty if all are finite
    bad_samples: list[int]  # images whose rows in that output are not finite
    bad_gradients: list[str]  # parameters whose gradient is not finite
    remarks: list[str]  # how the two computations differ

    @property
    def same(self) -> bool:
        """Whether both numbers are the same, bit for bit; NaN equals NaN."""
        return all(repr(self.then[name]) == repr(self.now[name]) for name in self.then)


def replay_step(folder: str | Path) -> Replay:
    """Compute the step of a crash dump again, on the CPU; raise a UserError if dump or images are not as they were."""
    check_path(folder, "CAPSULE")
    facts, weights = read_crash_dump(Path(folder))
    recipe = build_recipe(as_saved(facts.recipe), name=f"{folder}/capsule.json")
    source = open_source(recipe.data).without_labels()
    if len(source) != facts.images:
        raise UserError(f"{folder}: was made with {facts.images} images; {source.description} has {len(source)} now")
    remarks = _differences(facts, recipe)
    train: dict[str, Any] = {"compile": False, "clip_norm": 0.0}  # gradients as they were before clipping
    train |= {"precision": "bf16" if recipe.train.precision == "bf16" else "no"}  # fp16 needs a GPU
    data = recipe.data.model_copy(update={"workers": 0})
    recipe = replace(recipe, train=recipe.train.model_copy(update=train), data=data)
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.train.precision)
    try:
        state = set_up_training(recipe, source, accelerator, recovery=RecoveryState(rewinds=facts.rewinds))
        state.method.load_state_dict(weights)
        state.step = facts.step
        return _compute(state, facts, remarks)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(f"{folder}: the weights do not fit the recipe: {str(error).splitlines()[-1]}") from error
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _differences(facts: CrashFacts, recipe: Recipe) -> list[str]:
    """What may make the numbers differ from those of the run."""
    possible = {
        f"the run computed it on {facts.device}; the last digits differ on a CPU": facts.device != "cpu",
        f"{facts.processes} processes computed it, each with its own dropout and order of sums": facts.processes > 1,
        f"torch was {facts.torch} and is {torch.__version__}": facts.torch != torch.__version__,
        "the precision was fp16, with a loss scale; a CPU computes in float32": recipe.train.precision == "fp16",
    }
    return [remark for remark, applies in possible.items() if applies]


def _compute(state: TrainingState, facts: CrashFacts, remarks: list[str]) -> Replay:
    """Make the step, and look for the first numbers that are not finite."""
    state.method.train()
    bad_outputs = _record_bad_outputs(state.method)
    batch = next(iter(make_train_loader(state, state.step + 1)))
    result = train_step(state, batch, Guard(state.recipe.guard, state.recovery, state.method))
    grads = {name: param.grad for name, param in state.method.named_parameters() if param.grad is not None}
    sample_ids = batch.sample_ids.tolist()
    culprit, rows = bad_outputs[0] if bad_outputs else ("", [])
    return Replay(
        result.step,
        facts.problem,
        {"loss": facts.loss, "grad_norm": facts.grad_norm},
        {"loss": result.loss, "grad_norm": result.grad_norm},
        culprit,
        [sample_ids[row] for row in rows if row < len(sample_ids)],
        [name for name, grad in grads.items() if not torch.isfinite(grad).all()],
        remarks,
    )


def _record_bad_outputs(method: nn.Module) -> list[tuple[str, list[int]]]:
    """Record, during forward passes, each module whose output is not finite, and the rows of it that are not."""
    found: list[tuple[str, list[int]]] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            bad = ~torch.isfinite(output.flatten(1)).all(dim=1) if output.ndim > 1 else torch.tensor([])
            found.append((name, torch.nonzero(bad).flatten().tolist()))

    for name, module in method.named_modules():
        if not list(module.children()):
            module.register_forward_hook(partial(check, name))
    return found
