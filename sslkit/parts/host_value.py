"""A number in a buffer that is also known to the host."""

import torch
from torch import Tensor


class HostValue:
    """Reads and writes a () buffer. Only a read after somebody else has changed the buffer waits for the device.

    The buffer stays what is saved and loaded; this only remembers what was written to it.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, float] | None = None  # the buffer, its version, its value

    def read(self, buffer: Tensor) -> float:
        """The value of ``buffer``, a () tensor."""
        if self._known is None or self._known[0] is not buffer or self._known[1] != buffer._version:
            self._remember(buffer, buffer.item())
        assert self._known is not None
        return self._known[2]

    @torch.no_grad()
    def write(self, buffer: Tensor, value: float) -> None:
        """Set ``buffer``, a () tensor, to ``value``."""
        buffer.fill_(value)
        self._remember(buffer, value)

    def _remember(self, buffer: Tensor, value: float) -> None:
        self._known = buffer, buffer._version, value
