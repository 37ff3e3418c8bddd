"""What a checkpoint says beside its weights, held against what a run can have said; strangers write checkpoints too."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.engine.guard import Course, is_finite
from sslkit.errors import UserError

GROUP = "param_groups."
MAX_WHOLE = 2**53
# What each optimizer remembers of a parameter; of ``step`` one number, of all else as many as the parameter has.
SLOTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("SGD", "Lars", "Larc"), ("momentum_buffer",)),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def check_state(state: Any) -> None:
    """See that ``state.json`` has step, recipe, optimizer, scaler and course of a run.

    Raises:
        UserError: It has not; the sentence goes on from the file's name.
    """
    if not (
        isinstance(state, dict)
        and _is_whole(state.get("step"))
        and isinstance(state.get("recipe"), dict)
        and isinstance(state.get("optimizer"), dict)
        and all(isinstance(scalars, dict) for scalars in state["optimizer"].values())
    ):
        raise UserError("has no step, recipe and optimizer, as a checkpoint must")
    for name, scalars in state["optimizer"].items():
        for slot, value in scalars.items():
            if slot != "step" or not is_finite(value) or value < 0:
                raise UserError(f"optimizer {slot:.50} of {name:.100} cannot be {value!r:.50}")
    _check_scaler(state.get("scaler", {}))
    Course.from_json(state.get("course", {}))


def check_weights(model: Mapping[str, Tensor]) -> None:
    """See that whole numbers among the weights are counts: places in a queue, draws, batches.

    Raises:
        UserError: One is not; names it.
    """
    for name, tensor in model.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            continue
        numbers = tensor.double()
        if not ((numbers >= 0) & (numbers < MAX_WHOLE)).all():
            raise UserError(f"the checkpoint's {name:.100} has numbers that count nothing")


def check_optimizer(
    tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]], method: nn.Module, optimizer: Optimizer
) -> None:
    """See that an optimizer's state is of this optimizer, and of these parameters.

    Args:
        tensors: By ``parameter/slot`` or ``group/slot``.
        scalars: By parameter, then slot.
        method: Whose parameters they are.
        optimizer: Which takes them.

    Raises:
        UserError: Something is of neither, or of another shape; names it.
    """
    held = {param for group in optimizer.param_groups for param in group["params"]}
    params = {name: param for name, param in method.named_parameters() if param in held}
    slots = SLOTS[type(optimizer).__name__]
    found: dict[str, set[str]] = {name: set(of_it) for name, of_it in scalars.items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name.startswith(GROUP):
            _check_group(name, slot, tensor, len(optimizer.param_groups))
            continue
        found.setdefault(name, set()).add(slot)
        if name in params and slot in slots:
            _check_slot(name, slot, tensor, params[name])
    for name, its_slots in found.items():
        if name not in params or its_slots != set(slots):
            raise UserError(
                f"the checkpoint's optimizer has {', '.join(sorted(its_slots)):.100} of {name!r:.100}; this recipe's "
                f"has {', '.join(slots)} of each parameter that is trained"
            )


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_WHOLE


def _check_scaler(scaler: Any) -> None:
    """Empty, or all of what PyTorch's gradient scaler has."""
    if not isinstance(scaler, dict) or (scaler and scaler.keys() != {*SCALER}):
        raise UserError(f"scaler must be empty or have {', '.join(SCALER)}")
    for name in SCALER[: 3 * bool(scaler)]:
        if not is_finite(scaler[name]) or not 0 < scaler[name] < 2.0**120:
            raise UserError(f"scaler {name} cannot be {scaler[name]!r:.50}")
    for name in SCALER[3:] if scaler else ():
        if not _is_whole(scaler[name]) or (name == "growth_interval" and not scaler[name]):
            raise UserError(f"scaler {name} cannot be {scaler[name]!r:.50}")


def _check_group(name: str, slot: str, tensor: Tensor, count: int) -> None:
    if name.removeprefix(GROUP) not in map(str, range(count)) or slot != "step":
        raise UserError(f"the checkpoint's optimizer has {name:.50}/{slot:.50}, which no group of this recipe's has")
    _check_step(name, tensor)


def _check_slot(name: str, slot: str, tensor: Tensor, param: Tensor) -> None:
    if slot == "step":
        _check_step(name, tensor)
    elif tensor.shape != param.shape:
        raise UserError(f"the checkpoint's {slot} of {name} has another shape than {name} in this recipe")
    elif tensor.dtype != param.dtype:
        raise UserError(f"the checkpoint's {slot} of {name} is of {tensor.dtype}, and {name} of {param.dtype}")


def _check_step(name: str, tensor: Tensor) -> None:
    if tensor.ndim or tensor.dtype not in (torch.float32, torch.int64) or not 0 <= float(tensor) < MAX_WHOLE:
        raise UserError(f"the checkpoint's count of steps of {name:.100} is no count")
