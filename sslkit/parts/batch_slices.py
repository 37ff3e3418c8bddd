"""A batch in contiguous slices, each encoded by itself with its own batch statistics, and shuffled across processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslkit.distributed.collectives import exchange_rows, world_size
from sslkit.parts.batchnorm import GroupStatistics, device_norms, shares_collectives


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
            statistics.start_slice()
        parts.append(encode(part))
        if statistics is not None:
            statistics.end_slice()
    if statistics is not None:
        statistics.finish()
    return [torch.cat(features) if slices > 1 else features[0] for features in zip(*parts, strict=True)]


def encode_each(views: Iterable[Tensor], *modules: nn.Module) -> list[Tensor]:
    """Pass every view through ``modules``, one after the other; each view has batch statistics of its own.

    On GPUs, where the statistics are of several processes, views of one size go through in one pass: BatchNorm keeps
    them apart and gathers the statistics of all at once.
    """
    if shares_collectives(modules):
        views = list(views)
        one_size = len({view.shape for view in views}) == 1
        for layer in device_norms(modules):
            layer.view_rows = len(views[0]) if one_size else 0
        if one_size and len(views) > 1:
            number, joined = len(views), torch.cat(views)
            del views
            return list(_through(modules, joined).chunk(number))
    return [_through(modules, view) for view in views]


def encode_together(views: Sequence[Tensor], *modules: nn.Module) -> list[Tensor]:
    """Pass views of one size through ``modules`` in one pass; all views of a BN group share their batch statistics."""
    groups = max((layer.groups for layer in device_norms(modules)), default=1)
    if groups == 1:
        return list(_through(modules, torch.cat(list(views))).chunk(len(views)))
    # The rows of a group must be contiguous: its share of each view.
    shares = zip(*(view.chunk(groups) for view in views), strict=True)
    features = _through(modules, torch.cat([share for group in shares for share in group]))
    by_group = features.view(groups, len(views), -1, *features.shape[1:])
    return list(by_group.transpose(0, 1).flatten(1, 2))


def _through(modules: Iterable[nn.Module], rows: Tensor) -> Tensor:
    for module in modules:
        rows = module(rows)
    return rows
