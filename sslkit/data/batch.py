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

    Attributes:
        views: One (B, size, size, 3) uint8 tensor per view.
        sample_ids: (B,) int64, positions in the source of the images that the views show. If an image could not be
            read, this is the position of its replacement.
        bad: The images that could not be read.
        view_params: One (B, 18) float32 tensor per view, the parameters of the steps that are still to be done on the
            accelerator; empty if the views are finished. See `ViewParams.as_row`.
    """

    views: list[Tensor]
    sample_ids: Tensor
    bad: tuple[BadSample, ...] = ()
    view_params: tuple[Tensor, ...] = ()

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, so that the copy to a GPU is asynchronous; called by the DataLoader."""
        return replace(self, views=[view.pin_memory() for view in self.views], sample_ids=self.sample_ids.pin_memory())
