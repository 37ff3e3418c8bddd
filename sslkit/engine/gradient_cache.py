"""Gradients of a batch: the whole batch at once, or in slices, with the memory of a slice and the same result.

Accumulating the gradients of small batches gives another contrastive loss, in which each image meets fewer negatives.
GradCache (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983):

1. encode slice by slice without a graph and keep the features;
2. compute heads and loss once, on all features; keep the gradient of the loss with respect to the features;
3. encode slice by slice again, with a graph and the same random draws, and backpropagate that gradient.

Each slice is encoded twice: a third more arithmetic. The result equals that of the whole batch if the backbone has no
batch statistics; otherwise a slice is a BatchNorm group of its own, as a GPU is in the papers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslkit.distributed.collectives import average_gradients, exchange_rows, tensors_by_dtype
from sslkit.methods import BatchInfo, Method, Progress, Step, Views
from sslkit.methods.base import Permutation, Prepare
from sslkit.parts.backbone import recomputes
from sslkit.parts.batch_slices import shuffle_views, slice_views


@dataclass(frozen=True)
class GlobalBatch:
    """What the gradients of a step are computed from, on this process."""

    views: Views  # uint8 images, each (B, H, W, 3)
    info: BatchInfo  # sample ids, and whatever else was drawn for each sample
    progress: Progress  # counts the updates before this step
    permutation: Permutation | None  # order of the global batch's keys; None if they are not shuffled
    prepare: Prepare  # normalises uint8 views to (B, 3, H, W)


def whole_batch_step(accelerator: Accelerator, wrapped: nn.Module, batch: GlobalBatch) -> Step:
    """Forward and backward pass of the whole batch; DDP averages the gradients during the backward pass."""
    step: Step = wrapped(batch.views, batch.info, batch.progress, batch.permutation, batch.prepare)
    backbone = accelerator.unwrap_model(wrapped, keep_torch_compile=False).backbone
    with restored_buffers(backbone if recomputes(backbone) else nn.Module()):
        accelerator.backward(step.loss)
    return step


@contextmanager
def restored_buffers(module: nn.Module) -> Iterator[None]:
    """Restore running statistics afterwards: they have seen this batch once already."""
    kept = tensors_by_dtype(module.buffers())
    before = [[buffer.clone() for buffer in alike] for alike in kept]
    yield
    for buffers, values in zip(kept, before, strict=True):
        torch._foreach_copy_(buffers, values)


def sliced_step(
    accelerator: Accelerator, method: Method, batch: GlobalBatch, micro_batch: int, seed_slice: Callable[[int], None]
) -> Step:
    """The same loss and gradients, ``micro_batch`` images of each view at a time.

    ``method`` is not wrapped: its gradients are averaged once, at the end. ``seed_slice`` seeds the random draws of a
    slice; it is called twice for each.
    """
    slices = method.slices_of(len(batch.info.sample_ids), micro_batch)
    views, permutation, prepare = batch.views, batch.permutation, batch.prepare
    with torch.no_grad(), accelerator.autocast():
        encoded = method.student_in_slices(views, slices, permutation, prepare, seed_slice)
        keys = method.teacher_in_slices(views, slices, permutation, prepare)
        anchored = method.anchor_in_slices(views, slices, permutation, prepare)
    features = [each.requires_grad_() for each in encoded]
    with accelerator.autocast():
        step = method.anchored(method.objective(features, keys, batch.info, batch.progress), features, anchored)
    accelerator.backward(step.loss)
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in features]
    _backward_in_slices(accelerator, method, batch, slices, grads, seed_slice)
    average_gradients(method)
    return step


def _backward_in_slices(
    accelerator: Accelerator,
    method: Method,
    batch: GlobalBatch,
    slices: int,
    grads: list[Tensor],
    seed_slice: Callable[[int], None],
) -> None:
    """Encode each slice again with a graph, and backpropagate its part of the features' gradient."""
    if batch.permutation is not None:
        for index in method.student_key_views:
            grads[index] = exchange_rows(grads[index], batch.permutation)
    views = shuffle_views(batch.views, method.student_key_views, batch.permutation)
    parts = zip(*(grad.chunk(slices) for grad in grads), strict=True)
    with restored_buffers(method.backbone):
        for index, (part, grad) in enumerate(zip(slice_views(views, slices, batch.prepare), parts, strict=True)):
            seed_slice(index)
            with accelerator.autocast():
                outputs = method.student(part)
            torch.autograd.backward(outputs, list(grad))
