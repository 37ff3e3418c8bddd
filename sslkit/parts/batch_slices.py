"""A batch in contiguous slices, each encoded by itself with its own batch statistics, and shuffled across processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.distributed.collectives import exchange_rows, world_size
from sslkit.parts.batchnorm import GroupStatistics


class PreparedViews(Sequence[Tensor]):
    """Views that are prepared on access, because a method may use only one of them."""

    def __init__(self, views: Sequence[Tensor], prepare: Callable[[Tensor], Tensor]) -> None:
        self.views, self.prepare = views, prepare

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: Any) -> Any:
        return self.prepare(self.views[index])


def local_bn_groups(bn_groups: int) -> int:
    """Number of the global batch's BN groups on this process; at least 1."""
    return max(bn_groups // world_size(), 1)


def shuffle_views(
    views: Sequence[Tensor], which: tuple[int, ...], permutation: NDArray[np.int64] | None
) -> Sequence[Tensor]:
    """Permute the global batch of the views with these indices, across processes; None leaves them as they are."""
    if permutation is None:
        return views
    return [exchange_rows(view, permutation) if index in which else view for index, view in enumerate(views)]


def slice_views(
    views: Sequence[Tensor], slices: int, prepare: Callable[[Tensor], Tensor] | None = None
) -> list[Sequence[Tensor]]:
    """Cut the batch into ``slices`` contiguous parts of equal size."""
    parts = zip(*(view.chunk(slices) for view in views), strict=True)
    return [PreparedViews(part, prepare) if prepare else part for part in parts]


def encode_in_slices(
    encode: Callable[[Sequence[Tensor]], list[Tensor]],
    views: Sequence[Tensor],
    slices: int,
    prepare: Callable[[Tensor], Tensor] | None = None,
    before_slice: Callable[[int], None] | None = None,
    statistics: GroupStatistics | None = None,
) -> list[Tensor]:
    """Encode contiguous slices of the batch one after the other, each with its own batch statistics.

    Args:
        encode: Views of a slice to features.
        views: Of the whole batch, B rows each.
        slices: Number of slices.
        prepare: Normalises a view of a slice.
        before_slice: Called with the index of each slice before it is encoded.
        statistics: Makes one update of the running statistics from those of all slices.

    Returns:
        Features of the whole batch, B rows each.
    """
    parts = []
    for index, part in enumerate(slice_views(views, slices, prepare)):
        if before_slice is not None:
            before_slice(index)
        if statistics is not None:
            statistics.start_group()
        parts.append(encode(part))
        if statistics is not None:
            statistics.end_group()
    if statistics is not None:
        statistics.finish()
    return [torch.cat(features) if slices > 1 else features[0] for features in zip(*parts, strict=True)]
