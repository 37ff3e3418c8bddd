"""Whether what follows an update may change anything, decided on the device that trains.

The loop does not wait to hear from a GPU whether a step was good before it moves teacher and queue. It moves them under
a gate: a tensor on the device, 1 if the step reached the weights, else 0. `MomentumTeacher`, `KeyQueue` and
`MemoryBank` heed it. A method that keeps another large memory must heed it too: see `current_gate`. Buffers that are
smaller need not; the loop restores them after a bad step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_GATE: ContextVar[Tensor | None] = ContextVar("update gate", default=None)


@contextmanager
def gated(gate: Tensor | None) -> Iterator[None]:
    """Let ``gate``, a () float tensor of 1 or 0, decide about all moves inside; None allows them."""
    token = _GATE.set(gate)
    try:
        yield
    finally:
        _GATE.reset(token)


def current_gate() -> Tensor | None:
    """The gate that moves must heed; None if they may be made."""
    return _GATE.get()


def allowed(new: Tensor, old: Tensor) -> Tensor:
    """``new`` if moves are allowed, else ``old``, without waiting for the device."""
    gate = current_gate()
    return new if gate is None else torch.where(gate > 0, new, old)
