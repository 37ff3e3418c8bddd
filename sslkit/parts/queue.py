"""The queue of keys from earlier batches: MoCo's dictionary."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sslkit.parts.update_gate import allowed


class KeyQueue(nn.Module):
    """A first-in-first-out dictionary of L2-normalised keys.

    MoCo (arXiv:1911.05722, section 3.1). It starts with random unit vectors. It is the same on every process as
    long as every process pushes the gathered keys. It is part of the state dict, so a resumed run has it. The official
    code requires that the batch divides the size; this queue wraps around at any batch size.

    Attributes:
        keys: (K, C) buffer, one key a row.
        pointer: () int64 buffer, the row that the next key overwrites.

    Args:
        size: Number of keys K (65536 in the papers).
        dim: Embedding width C (128 in the papers).
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor, size: int | None = None) -> None:
        """Overwrite the oldest rows with ``keys`` (N, C), the global batch in rank order; N may exceed K.

        Args:
            keys: L2-normalised.
            size: Use only the first so many rows of the queue; None: all. 0 keeps nothing.
        """
        size = self.keys.shape[0] if size is None else size
        if not size:
            return
        overflow = max(keys.shape[0] - size, 0)
        rows = (self.pointer + torch.arange(overflow, keys.shape[0], device=self.keys.device)) % size
        self.keys.index_copy_(0, rows, allowed(keys[overflow:].to(self.keys), self.keys[rows]))
        self.pointer.copy_(allowed((self.pointer + keys.shape[0]) % size, self.pointer))
