"""Naive loops of the contrastive mechanisms beside MoCo's queue, with MoCo's softmax loss.

Three dictionaries: keys of the same batch by the same encoder (end-to-end), a memory bank, and the queue of
MoCo v2 used in both directions. The end-to-end baseline shares the encoder between queries and keys.

Conventions: state dicts have the prefixes ``backbone.`` and ``projector.``. Modules run in train mode. A
global batch is cut into ``groups`` equal contiguous slices with one network call each, in order, so that BN
sees one slice at a time (see ``moco_v1v2.grouped_forward``). A permutation p puts image p[j] at position j of
the batch before it is cut; the features are put back in order afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import OptimizerFactory, copied_student, gradient_step, state_of, trainable
from .formulas import l2_rows, moco_logits_loss
from .instdisc import move_bank
from .moco_v1v2 import grouped_forward, move_teacher, push_keys


@dataclass(frozen=True)
class EndToEndRun:
    """What an end-to-end run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict of the shared encoder.
    """

    losses: list[float]
    student: dict[str, Tensor]


@dataclass(frozen=True)
class MemoryBankRun:
    """What a memory-bank run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict of the encoder.
        bank: Final bank, shape (n, d).
    """

    losses: list[float]
    student: dict[str, Tensor]
    bank: Tensor


@dataclass(frozen=True)
class SymmetricMocoRun:
    """What a symmetric MoCo run leaves behind.

    Attributes:
        losses: Sum of both directions at every step, before its update.
        student: Final state dict of the query encoder.
        teacher: Final state dict of the key encoder.
        queue: Final queue, shape (d, K).
        pointer: Column that the next key would overwrite.
    """

    losses: list[float]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    queue: Tensor
    pointer: int


def embed(net: nn.ModuleDict, x: Tensor, groups: int, permutation: Tensor | None = None) -> Tensor:
    """Embeds a batch slice by slice, shuffled beforehand and put back in order if there is a permutation.

    Args:
        net: Entries ``backbone`` and ``projector``.
        x: Images, shape (B, ...).
        groups: Number of equal slices.
        permutation: Position j of the shuffled batch holds image permutation[j]; None for no shuffling.

    Returns:
        Raw embeddings in the order of x, shape (B, d), with graph.
    """
    encoder = nn.ModuleDict({"backbone": net["backbone"], "head": net["projector"]})
    if permutation is None:
        return grouped_forward(encoder, x, groups)
    shuffled = grouped_forward(encoder, x[permutation], groups)
    back: list[Tensor] = [shuffled[0]] * x.shape[0]
    for j, source in enumerate(permutation.tolist()):
        back[source] = shuffled[j]
    return torch.stack(back)


def in_batch_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """InfoNCE of every query against all keys of the batch, its own one positive, the others negatives.

    Args:
        query: Raw queries, shape (B, d). Gradient flows here.
        key: Raw keys, shape (B, d). Gradient flows here too.
        temperature: Softmax temperature.

    Returns:
        Float64 scalar, the mean over the queries, one direction.
    """
    q, k = l2_rows(query), l2_rows(key)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(q.shape[0]):
        row = torch.stack([(q[i] * k[j]).sum() for j in range(k.shape[0])]) / temperature
        total = total + torch.logsumexp(row, dim=0) - row[i]
    return total / q.shape[0]


def memory_bank_loss(query: Tensor, bank: Tensor, sample_ids: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Softmax cross-entropy of [own bank row, K given bank rows].

    Args:
        query: Raw queries, shape (B, d). Gradient flows here only.
        bank: Shape (n, d), used as it is.
        sample_ids: Data set index of every query, shape (B,).
        negatives: Bank rows, shape (B, K). Hits on the sample itself and repeats are kept.
        temperature: Softmax temperature.

    Returns:
        Float64 scalar, the mean over the queries.
    """
    q, memory = l2_rows(query), bank.double().detach()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(q.shape[0]):
        columns = [int(sample_ids[i]), *negatives[i].tolist()]
        row = torch.stack([(q[i] * memory[j]).sum() for j in columns]) / temperature
        total = total + torch.logsumexp(row, dim=0) - row[0]
    return total / q.shape[0]


def train_end_to_end(
    backbone: nn.Module,
    projector: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    permutations: Sequence[Tensor],
    groups: int,
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
) -> EndToEndRun:
    """Trains with the keys of the same batch, encoded by the same network, gradient through both.

    Step t: query slices forward, then slices of the permuted keys, loss, backward, optimizer at lrs[t]. The
    BN buffers move in the order of these forwards.

    Args:
        backbone: Trunk; copied, as is the projector.
        projector: Projector.
        batches: For every step the query images and the key images of the global batch, shape (B, ...) each.
        permutations: For every step the permutation of the key batch.
        groups: Number of slices.
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable parameters, in module order.
        lrs: Learning rate of every step.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector)
    optimizer = optimizer_factory(trainable(student))
    losses = []
    for (view_q, view_k), permutation, lr in zip(batches, permutations, lrs, strict=True):
        query = embed(student, view_q, groups)
        key = embed(student, view_k, groups, permutation)
        loss = in_batch_loss(query, key, temperature)
        gradient_step(optimizer, loss, lr)
        losses.append(loss.item())
    return EndToEndRun(losses, state_of(student))


def train_memory_bank(
    backbone: nn.Module,
    projector: nn.Module,
    bank: Tensor,
    batches: Sequence[Tensor],
    sample_ids: Sequence[Tensor],
    negatives: Sequence[Tensor],
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    bank_momentum: float = 0.5,
    groups: int = 1,
) -> MemoryBankRun:
    """Trains with a memory bank and softmax cross-entropy; nothing is shuffled.

    Step t: forward, loss against the bank as it is, backward, optimizer at lrs[t], bank rows of the batch moved
    with the embeddings of this forward (see ``instdisc.move_bank`` for duplicates).

    Args:
        backbone: Trunk; copied, as are projector and bank.
        projector: Projector; its output is normalised.
        bank: Initial bank, shape (n, d).
        batches: For every step the images, shape (B, ...).
        sample_ids: For every step the data set index of every image, shape (B,).
        negatives: For every step the bank rows of the negatives, shape (B, K).
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable parameters, in module order.
        lrs: Learning rate of every step.
        bank_momentum: Share of the old row in an update.
        groups: Number of slices for BN.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector)
    optimizer = optimizer_factory(trainable(student))
    bank = bank.clone()
    losses = []
    for images, ids, rows, lr in zip(batches, sample_ids, negatives, lrs, strict=True):
        query = embed(student, images, groups)
        loss = memory_bank_loss(query, bank, ids, rows, temperature)
        gradient_step(optimizer, loss, lr)
        move_bank(bank, ids, query, bank_momentum)
        losses.append(loss.item())
    return MemoryBankRun(losses, state_of(student), bank)


def train_symmetric_moco(
    backbone: nn.Module,
    projector: nn.Module,
    queue: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    permutations: Sequence[Tensor],
    groups: int,
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    teacher_momenta: Sequence[float],
) -> SymmetricMocoRun:
    """Trains MoCo v2 in both directions: (q1 to k2 and queue) + (q2 to k1 and queue), the same queue for both.

    Step t: q1, q2 by the student, k1, k2 by the teacher without gradient (both shuffled with the permutation
    of the step), summed loss, optimizer at lrs[t], one teacher move with teacher_momenta[t] towards the
    student just updated, then 2B keys pushed, all of view 1 before all of view 2, wrapping.

    Args:
        backbone: Trunk of the student; copied, as are projector and queue. The teacher starts as a copy.
        projector: Projector of the student.
        queue: Initial queue, shape (d, K), unit-norm columns.
        batches: For every step the global batch of view 1 and of view 2, shape (B, ...) each.
        permutations: For every step the permutation of the key batch of either view.
        groups: Number of slices.
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable student parameters, in module order.
        lrs: Learning rate of every step.
        teacher_momenta: EMA momentum of every step.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = optimizer_factory(trainable(student))
    queue, pointer = queue.clone(), 0
    losses = []
    for (view1, view2), permutation, lr, momentum in zip(batches, permutations, lrs, teacher_momenta, strict=True):
        q1, q2 = (embed(student, view, groups) for view in (view1, view2))
        with torch.no_grad():
            k1, k2 = (embed(teacher, view, groups, permutation) for view in (view1, view2))
        towards_k2, _ = moco_logits_loss(q1, k2, queue, temperature)
        towards_k1, _ = moco_logits_loss(q2, k1, queue, temperature)
        loss = towards_k2 + towards_k1
        gradient_step(optimizer, loss, lr)
        move_teacher(teacher, student, momentum)
        pointer = push_keys(queue, pointer, torch.cat([k1, k2]))
        losses.append(loss.item())
    return SymmetricMocoRun(losses, state_of(student), state_of(teacher), queue, pointer)
