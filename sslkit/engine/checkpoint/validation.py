"""What a checkpoint says beside its weights, held against what a run can have said; strangers write checkpoints too."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.engine.state import RecoveryState
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import number

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
            if slot != "step" or number(value) is None or value < 0:
                raise UserError(f"optimizer {slot:.50} of {name:.100} cannot be {value!r:.50}")
    without = state.get("without_state", [])
    if not isinstance(without, list) or not all(isinstance(name, str) for name in without):
        raise UserError(f"without_state must be a list of parameters, not {without!r:.50}")
    if not isinstance(state.get("images", ""), str):
        raise UserError(f"images must be a sum of their names, not {state['images']!r:.50}")
    _check_scaler(state.get("scaler", {}))
    RecoveryState.from_json(state.get("course", {}))


def check_weights(model: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """See that weights have the names, shapes and dtypes of a recipe's, and that whole numbers are counts.

    Args:
        model: Of a checkpoint.
        held: The state dict that they are for.

    Raises:
        UserError: They are not; names the tensor, what it is and what it should be.
    """
    for name, ours in held.items():
        if name not in model:
            raise UserError(f"the checkpoint's weights do not fit this recipe: {name} ({_kind(ours)}) is missing")
        if _kind(model[name]) != _kind(ours):
            raise UserError(
                f"the checkpoint's weights do not fit this recipe: {name} is {_kind(model[name])}, not {_kind(ours)}"
            )
    for name, tensor in model.items():
        if name not in held:
            raise UserError(f"the checkpoint's weights do not fit this recipe, which has no {name:.100}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            continue
        numbers = tensor.double()
        if not ((numbers >= 0) & (numbers < MAX_WHOLE)).all():
            raise UserError(f"the checkpoint's {name:.100} has numbers that count nothing")


def _kind(tensor: Tensor) -> str:
    """Dtype and shape, such as ``float32 (3, 4)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_optimizer(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], method: nn.Module, optimizer: Optimizer
) -> None:
    """See that an optimizer's state is of this optimizer and of these parameters, and that none of it is missing.

    Args:
        tensors: By ``parameter/slot`` or ``group/slot``.
        state: Of ``state.json``: plain numbers by parameter, then slot, and which parameters had no state.
        method: Whose parameters they are.
        optimizer: Which takes them.

    Raises:
        UserError: Something is of neither, missing, or of another shape; names it.
    """
    held = {param for group in optimizer.param_groups for param in group["params"]}
    params = {name: param for name, param in method.named_parameters() if param in held}
    slots = SLOTS[type(optimizer).__name__]
    found: dict[str, set[str]] = {name: set(of_it) for name, of_it in state["optimizer"].items()}
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
    _check_nothing_is_missing(set(found), tensors, state, params, optimizer)


def _check_nothing_is_missing(
    found: set[str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    params: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
) -> None:
    slots = ", ".join(SLOTS[type(optimizer).__name__])
    for name in params:
        if name not in found and not _may_be_missing(name, state, optimizer, nothing=not found):
            raise UserError(f"the checkpoint's optimizer has no {slots} of {name!r:.100}, which it needs")
    if type(optimizer).__name__ == "Lamb":
        ids = {id(params[name]) for name in found}
        for index, group in enumerate(optimizer.param_groups):
            if f"{GROUP}{index}/step" not in tensors and not ids.isdisjoint(map(id, group["params"])):
                raise UserError(f"the checkpoint's optimizer has no count of steps of {GROUP}{index}, which it needs")


def _may_be_missing(name: str, state: Mapping[str, Any], optimizer: Optimizer, *, nothing: bool) -> bool:
    """Whether a parameter need not have a state: it had no gradient yet when the checkpoint was saved.

    Earlier versions did not write down which; of their checkpoints only one without any state is incomplete.
    """
    if "without_state" in state:
        return name in state["without_state"]
    untouched = not state["step"] or bool(state.get("scaler"))  # a gradient scaler may have skipped all steps
    return not nothing or untouched or not any(group.get("momentum", 1.0) for group in optimizer.param_groups)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_WHOLE


def _check_scaler(scaler: Any) -> None:
    """Empty, or all of what PyTorch's gradient scaler has."""
    if not isinstance(scaler, dict) or (scaler and scaler.keys() != {*SCALER}):
        raise UserError(f"scaler must be empty or have {', '.join(SCALER)}")
    for name in SCALER[: 3 * bool(scaler)]:
        if number(scaler[name]) is None or not 0 < scaler[name] < 2.0**120:
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
