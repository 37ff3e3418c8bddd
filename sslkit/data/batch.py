"""A batch as the data loader yields it."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """An image that could not be read."""

    index: int  # position in the source
    name: str  # printable
    reason: str


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch.

    ``view_params`` has one (B, 18) float32 tensor per view, rows of `ViewParams.as_row`, for the steps that the
    accelerator still has to do; it is empty if the views are finished.
    """

    views: list[Tensor]  # one (B, size, size, 3) uint8 tensor per view
    sample_ids: Tensor  # (B,) int64, positions in the source of the images (or replacements) that the views show
    bad: tuple[BadSample, ...] = ()
    view_params: tuple[Tensor, ...] = ()

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, so that the copy to a GPU is asynchronous; called by the DataLoader."""
        return replace(self, views=[view.pin_memory() for view in self.views], sample_ids=self.sample_ids.pin_memory())
