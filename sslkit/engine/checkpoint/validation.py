"""Check the content of a checkpoint before it is loaded, because it may come from an untrusted source."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.engine.state import MAX_STEP, RecoveryState
from sslkit.errors import UserError
from sslkit.files.json_reader import StrictModel

GROUP = "param_groups."
# State slots of each optimizer. ``step`` is a scalar, the others have the shape of the parameter.
SLOTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("SGD", "Lars", "Larc"), ("momentum_buffer",)),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
Scale = Annotated[float, Field(gt=0, lt=2.0**120)]


class SavedScaler(StrictModel):
    """The state of PyTorch's gradient scaler; empty without one."""

    scale: Scale = 1.0
    growth_factor: Scale = 1.0
    backoff_factor: Scale = 1.0
    growth_interval: int = Field(default=1, ge=1, lt=MAX_STEP)
    growth_tracker: int = Field(default=0, ge=0, lt=MAX_STEP, alias="_growth_tracker")

    @model_validator(mode="after")
    def _empty_or_complete(self) -> "SavedScaler":
        if 0 < len(self.model_fields_set) < len(SCALER):
            raise ValueError(f"must be empty or have {', '.join(SCALER)}")
        return self


class SavedState(BaseModel):
    """The fields of ``state.json``. Keys of newer versions are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int = Field(ge=0, lt=MAX_STEP)
    recipe: dict[str, Any]
    optimizer: dict[str, dict[Literal["step"], Annotated[float, Field(ge=0)]]]  # scalars by parameter
    without_state: list[str] = []  # trained parameters that had no gradient yet
    images: str = ""  # digest of their names
    scaler: SavedScaler = SavedScaler()
    course: RecoveryState = RecoveryState()


def check_weights(model: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Raise a UserError if weights differ from a state dict in names, shapes or dtypes, or integers are not counts."""
    for name, tensor in held.items():
        expected, found = _kind(tensor), _kind(model[name]) if name in model else "missing"
        if found != expected:
            raise UserError(f"the checkpoint's weights do not fit this recipe: {name} is {found}, must be {expected}")
    for name, tensor in model.items():
        if name not in held:
            raise UserError(f"the checkpoint's weights do not fit this recipe, which has no {name:.100}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            continue
        numbers = tensor.double()
        if not ((numbers >= 0) & (numbers < MAX_STEP)).all():
            raise UserError(f"the checkpoint's {name:.100} must be counts, from 0 to 2^53")


def _kind(tensor: Tensor) -> str:
    """Dtype and shape, such as ``float32 (3, 4)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_optimizer(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], method: nn.Module, optimizer: Optimizer
) -> None:
    """Raise a UserError if a slot of an optimizer is missing, unknown or of another shape than its parameter.

    ``tensors`` are by ``parameter/slot`` or ``group/slot``; ``state`` is the content of ``state.json``.
    """
    held = {param for group in optimizer.param_groups for param in group["params"]}
    params = {name: param for name, param in method.named_parameters() if param in held}
    slots = SLOTS[type(optimizer).__name__]
    found: dict[str, set[str]] = {name: set(scalars) for name, scalars in state["optimizer"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name.startswith(GROUP):
            if name.removeprefix(GROUP) not in map(str, range(len(optimizer.param_groups))) or slot != "step":
                raise UserError(f"the checkpoint's optimizer state has {key:.100}, which this recipe does not")
            _check_step(name, tensor)
            continue
        found.setdefault(name, set()).add(slot)
        if name in params and slot in slots:
            _check_slot(name, slot, tensor, params[name])
    for name, saved in found.items():
        if name not in params or saved != set(slots):
            raise UserError(
                f"the checkpoint's optimizer state has {', '.join(sorted(saved)):.100} of {name!r:.100}; this "
                f"recipe needs {', '.join(slots)} of each trained parameter"
            )
    _check_complete(set(found), tensors, state, params, optimizer)


def _check_complete(
    found: set[str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    params: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
) -> None:
    slots = ", ".join(SLOTS[type(optimizer).__name__])
    for name in params:
        if name not in found and not _may_be_missing(name, state, optimizer, nothing=not found):
            raise UserError(f"the checkpoint's optimizer state has no {slots} of {name!r:.100}")
    if type(optimizer).__name__ == "Lamb":
        known = {params[name] for name in found}
        for index, group in enumerate(optimizer.param_groups):
            if f"{GROUP}{index}/step" not in tensors and not known.isdisjoint(group["params"]):
                raise UserError(f"the checkpoint's optimizer state has no step count of {GROUP}{index}")


def _may_be_missing(name: str, state: Mapping[str, Any], optimizer: Optimizer, *, nothing: bool) -> bool:
    """Whether a parameter may have no state, because it had no gradient yet when the checkpoint was saved.

    Earlier versions did not record which; for their checkpoints, only the lack of all state is an error.
    """
    if "without_state" in state:
        return name in state["without_state"]
    untouched = not state["step"] or bool(state.get("scaler"))  # a gradient scaler may have skipped all steps
    return not nothing or untouched or not any(group.get("momentum", 1.0) for group in optimizer.param_groups)


def _check_slot(name: str, slot: str, tensor: Tensor, param: Tensor) -> None:
    if slot == "step":
        _check_step(name, tensor)
    elif tensor.shape != param.shape:
        raise UserError(f"the checkpoint's {slot} of {name} has another shape than {name} in this recipe")
    elif tensor.dtype != param.dtype:
        raise UserError(f"the checkpoint's {slot} of {name} is {tensor.dtype}, must be {param.dtype}")


def _check_step(name: str, tensor: Tensor) -> None:
    if tensor.ndim or tensor.dtype not in (torch.float32, torch.int64) or not 0 <= float(tensor) < MAX_STEP:
        raise UserError(f"the checkpoint's step count of {name:.100} must be a number from 0 to 2^53")
