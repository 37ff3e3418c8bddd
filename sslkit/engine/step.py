"""One step's gradients: the whole batch at once, or in slices whose memory is a slice's and whose result is the same.

A contrastive loss compares the images of a batch with each other, so accumulating the gradients of small batches
gives another loss: each image would meet fewer negatives. But between backbone and loss lie only features, which are
small. So (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983):

1. encode slice by slice without a graph and keep the features;
2. heads and loss once, on all features; keep the loss's gradient with respect to the features;
3. encode slice by slice again, with a graph and the same random draws, and send that gradient on.

It costs a third more arithmetic (each slice is encoded twice) and no approximation: equal to the whole batch where
the backbone has no batch statistics; where it has them, a slice is a group of its own, as a GPU is in the papers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslkit.distributed.collectives import average_gradients, exchange_rows
from sslkit.methods import BatchInfo, Method, Progress, Step, Views
from sslkit.methods.base import Permutation, Prepare
from sslkit.parts.backbone import recomputes
from sslkit.parts.batch_slices import local_bn_groups, shuffle_views, slice_views


@dataclass(frozen=True)
class GlobalBatch:
    """What a step is computed from, on this process.

    Attributes:
        views: uint8 images, each (B, H, W, 3).
        info: Sample ids, and whatever else was drawn for each sample.
        progress: Position in training; counts the updates before this step.
        permutation: Of the global batch's keys, or None.
        prepare: uint8 views to normalised ones, (B, 3, H, W).
    """

    views: Views
    info: BatchInfo
    progress: Progress
    permutation: Permutation | None
    prepare: Prepare


def whole_batch_step(accelerator: Accelerator, wrapped: nn.Module, batch: GlobalBatch) -> Step:
    """Forward and backward of the whole batch; DDP reduces the gradients on the way."""
    step: Step = wrapped(batch.views, batch.info, batch.progress, batch.permutation, batch.prepare)
    backbone = accelerator.unwrap_model(wrapped, keep_torch_compile=False).backbone
    with buffers_kept(backbone if recomputes(backbone) else nn.Module()):
        accelerator.backward(step.loss)
    return step


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put running statistics back afterwards: they have seen this batch once already."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    for buffer, value in zip(module.buffers(), before, strict=True):
        buffer.copy_(value)


def sliced_step(
    accelerator: Accelerator,
    method: Method,
    batch: GlobalBatch,
    micro_batch: int,
    seed_slice: Callable[[int], None],
) -> Step:
    """The same loss and gradients, ``micro_batch`` images at a time; processes reduce gradients once, at the end.

    Args:
        accelerator: Precision and loss scale.
        method: Not wrapped.
        batch: Whole batch of this process.
        micro_batch: Images of each view in the backbone at a time.
        seed_slice: Seeds the random draws of a slice; called twice for each.
    """
    slices = max(len(batch.info.sample_ids) // micro_batch, local_bn_groups(method.bn_groups))
    views, permutation, prepare = batch.views, batch.permutation, batch.prepare
    with torch.no_grad(), accelerator.autocast():
        encoded = method.student_in_slices(views, slices, permutation, prepare, seed_slice)
        keys = method.teacher_in_slices(views, slices, permutation, prepare)
    features = [each.requires_grad_() for each in encoded]
    with accelerator.autocast():
        step = method.objective(features, keys, batch.info, batch.progress)
    accelerator.backward(step.loss)
    _replay(accelerator, method, batch, slices, [_grad_of(each) for each in features], seed_slice)
    average_gradients(method)
    return step


def _replay(
    accelerator: Accelerator,
    method: Method,
    batch: GlobalBatch,
    slices: int,
    grads: list[Tensor],
    seed_slice: Callable[[int], None],
) -> None:
    """Encode again with a graph and send each slice's part of the features' gradient through it."""
    if batch.permutation is not None:
        for index in method.student_key_views:
            grads[index] = exchange_rows(grads[index], batch.permutation)
    views = shuffle_views(batch.views, method.student_key_views, batch.permutation)
    parts = zip(*(grad.chunk(slices) for grad in grads), strict=True)
    with buffers_kept(method.backbone):
        for index, (part, grad) in enumerate(zip(slice_views(views, slices, batch.prepare), parts, strict=True)):
            seed_slice(index)
            with accelerator.autocast():
                outputs = method.student(part)
            torch.autograd.backward(outputs, list(grad))


def _grad_of(features: Tensor) -> Tensor:
    return features.grad if features.grad is not None else torch.zeros_like(features)
