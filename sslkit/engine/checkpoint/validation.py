"""Check the content of a checkpoint before it is loaded, because it may come from an untrusted source."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.engine.state import RecoveryState
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import number

GROUP = "param_groups."
MAX_COUNT = 2**53
# State slots of each optimizer. ``step`` is a scalar, the others have the shape of the parameter.
SLOTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("SGD", "Lars", "Larc"), ("momentum_buffer",)),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def check_state(state: Any) -> None:
    """Check the fields of ``state.json``: step, recipe, optimizer, scaler and recovery state (``course``).

    Raises:
        UserError: A field is missing or invalid. The message continues the file name.
    """
    if not (
        isinstance(state, dict)
        and _is_count(state.get("step"))
        and isinstance(state.get("recipe"), dict)
        and isinstance(state.get("optimizer"), dict)
        and all(isinstance(scalars, dict) for scalars in state["optimizer"].values())
    ):
        raise UserError("has no step, recipe and optimizer, which every checkpoint has")
    for name, scalars in state["optimizer"].items():
        for slot, value in scalars.items():
            if slot != "step" or number(value) is None or value < 0:
                raise UserError(f"optimizer {slot:.50} of {name:.100} cannot be {value!r:.50}")
    without = state.get("without_state", [])
    if not isinstance(without, list) or not all(isinstance(name, str) for name in without):
        raise UserError(f"without_state must be a list of parameter names, not {without!r:.50}")
    if not isinstance(state.get("images", ""), str):
        raise UserError(f"images must be a digest of their names, not {state['images']!r:.50}")
    _check_scaler(state.get("scaler", {}))
    RecoveryState.from_json(state.get("course", {}))


def check_weights(model: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Check that weights have the names, shapes and dtypes of a state dict, and that integers are counts.

    Args:
        model: Weights of a checkpoint.
        held: The state dict to load them into.

    Raises:
        UserError: A tensor does not fit; names it, what it is and what it should be.
    """
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
        if not ((numbers >= 0) & (numbers < MAX_COUNT)).all():
            raise UserError(f"the checkpoint's {name:.100} must be counts, from 0 to 2^53")


def _kind(tensor: Tensor) -> str:
    """Dtype and shape, such as ``float32 (3, 4)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_optimizer(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], method: nn.Module, optimizer: Optimizer
) -> None:
    """Check that optimizer state fits an optimizer and its parameters, and that none is missing.

    Args:
        tensors: By ``parameter/slot`` or ``group/slot``.
        state: Content of ``state.json``: scalars by parameter, then slot, and parameters without state.
        method: Has the parameters.
        optimizer: The optimizer to load the state into.

    Raises:
        UserError: A slot is missing, unknown or of another shape; names it.
    """
    held = {param for group in optimizer.param_groups for param in group["params"]}
    params = {name: param for name, param in method.named_parameters() if param in held}
    slots = SLOTS[type(optimizer).__name__]
    found: dict[str, set[str]] = {name: set(scalars) for name, scalars in state["optimizer"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name.startswith(GROUP):
            _check_group(name, slot, tensor, len(optimizer.param_groups))
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
        ids = {id(params[name]) for name in found}
        for index, group in enumerate(optimizer.param_groups):
            if f"{GROUP}{index}/step" not in tensors and not ids.isdisjoint(map(id, group["params"])):
                raise UserError(f"the checkpoint's optimizer state has no step count of {GROUP}{index}")


def _may_be_missing(name: str, state: Mapping[str, Any], optimizer: Optimizer, *, nothing: bool) -> bool:
    """Whether a parameter may have no state, because it had no gradient yet when the checkpoint was saved.

    Earlier versions did not record which; for their checkpoints, only the lack of all state is an error.
    """
    if "without_state" in state:
        return name in state["without_state"]
    untouched = not state["step"] or bool(state.get("scaler"))  # a gradient scaler may have skipped all steps
    return not nothing or untouched or not any(group.get("momentum", 1.0) for group in optimizer.param_groups)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _check_scaler(scaler: Any) -> None:
    """The state of PyTorch's gradient scaler; empty without one."""
    if not isinstance(scaler, dict) or (scaler and scaler.keys() != {*SCALER}):
        raise UserError(f"scaler must be empty or have {', '.join(SCALER)}")
    for name in SCALER[: 3 * bool(scaler)]:
        if number(scaler[name]) is None or not 0 < scaler[name] < 2.0**120:
            raise UserError(f"scaler {name} cannot be {scaler[name]!r:.50}")
    for name in SCALER[3:] if scaler else ():
        if not _is_count(scaler[name]) or (name == "growth_interval" and not scaler[name]):
            raise UserError(f"scaler {name} cannot be {scaler[name]!r:.50}")


def _check_group(name: str, slot: str, tensor: Tensor, count: int) -> None:
    if name.removeprefix(GROUP) not in map(str, range(count)) or slot != "step":
        raise UserError(f"the checkpoint's optimizer state has {name:.50}/{slot:.50}, which this recipe does not")
    _check_step(name, tensor)


def _check_slot(name: str, slot: str, tensor: Tensor, param: Tensor) -> None:
    if slot == "step":
        _check_step(name, tensor)
    elif tensor.shape != param.shape:
        raise UserError(f"the checkpoint's {slot} of {name} has another shape than {name} in this recipe")
    elif tensor.dtype != param.dtype:
        raise UserError(f"the checkpoint's {slot} of {name} is {tensor.dtype}, must be {param.dtype}")


def _check_step(name: str, tensor: Tensor) -> None:
    if tensor.ndim or tensor.dtype not in (torch.float32, torch.int64) or not 0 <= float(tensor) < MAX_COUNT:
        raise UserError(f"the checkpoint's step count of {name:.100} must be a number from 0 to 2^53")
