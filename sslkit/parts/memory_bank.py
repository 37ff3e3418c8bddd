"""The memory bank: a stored embedding of every sample, which takes the place of an encoder of keys."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sslkit.distributed.collectives import gather_rows, rank, upload, world_size
from sslkit.parts.host_value import HostValue
from sslkit.parts.update_gate import allowed


class MemoryBank(nn.Module):
    """One embedding for each sample of the data, moved towards the sample's newest embedding when it is seen.

    InstDisc (Wu et al., 2018, arXiv:1805.01978, section 3). It is the same on every process as long as every
    process updates it with the gathered batch. It is part of the state dict, so a resumed run has it.

    Attributes:
        rows: (n, C) buffer. Drawn uniformly so that rows have about unit norm; normalised when first updated.
        draws: () int64 buffer, number of updates; the seed of the next draw of noise depends on it.

    Args:
        num_samples: Samples in the data, n.
        dim: Embedding width C.
    """

    rows: Tensor
    draws: Tensor
    seed: Tensor

    def __init__(self, num_samples: int, dim: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(dim / 3)
        self.register_buffer("rows", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.register_buffer("seed", torch.randint(2**40, ()))
        self.kept: tuple[Tensor, Tensor] | None = None
        self._draws, self._seed = HostValue(), HostValue()

    def draw_noise(self, batch: int, num_negatives: int) -> Tensor:
        """Draw (B, K) row numbers for this process's ``batch``: uniform, with replacement, the positive included.

        One draw serves the global batch; each process takes its part. It is made on the CPU, so that it is the same on
        every device.
        """
        seed = int(self._seed.read(self.seed)) + int(self._draws.read(self.draws))
        shape = (batch * world_size(), num_negatives)
        drawn = torch.randint(len(self.rows), shape, generator=torch.Generator().manual_seed(seed))
        return upload(drawn[rank() * batch : (rank() + 1) * batch], self.rows.device)

    @torch.no_grad()
    def keep(self, sample_ids: Tensor, embeddings: Tensor) -> None:
        """Gather the samples (B,) and embeddings (B, C) of all processes for `update_with_kept`."""
        self.kept = gather_rows(sample_ids), gather_rows(embeddings)

    def update_with_kept(self, momentum: float) -> None:
        """Call `update` with what `keep` gathered since the last time, if anything."""
        if self.kept is not None:
            self.update(*self.kept, momentum)
            self.kept = None

    @torch.no_grad()
    def update(self, sample_ids: Tensor, embeddings: Tensor, momentum: float) -> None:
        """Move rows ``sample_ids`` (N,) to ``normalise(momentum * row + (1 - momentum) * embedding)``.

        Args:
            sample_ids: Of the global batch.
            embeddings: (N, C), L2-normalised, in the same order.
            momentum: Weight of the old row (0.5 in the paper's code).
        """
        old = self.rows[sample_ids]
        moved = momentum * old + (1.0 - momentum) * embeddings.to(self.rows)
        self.rows[sample_ids] = allowed(functional.normalize(moved, dim=1), old)
        self._draws.write(self.draws, self._draws.read(self.draws) + 1)
