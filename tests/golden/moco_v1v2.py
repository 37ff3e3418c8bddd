"""Naive training loops of MoCo v1/v2 with virtual GPU groups, shuffled keys and a queue.

Conventions: student and teacher are ``nn.ModuleDict`` with entries ``backbone`` and ``head``, so state dicts
have the prefixes ``backbone.`` and ``head.``. Both run in train mode. A batch is split into ``groups`` equal
contiguous slices and the network is called once per slice, in order: BN normalises with the statistics of the
slice; its running statistics (and ``num_batches_tracked``) move once, by the mean over the slices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import one_update_of_statistics
from .formulas import l2_rows, moco_logits_loss


@dataclass(frozen=True)
class MocoRun:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict of the query encoder.
        teacher: Final state dict of the key encoder.
        queue: Final queue, shape (dim, K).
        pointer: Column that the next key would overwrite.
    """

    losses: list[float]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    queue: Tensor
    pointer: int


def grouped_forward(net: nn.ModuleDict, x: Tensor, groups: int) -> Tensor:
    """Embeds a batch with one call of the network per contiguous slice.

    Args:
        net: Entries ``backbone`` and ``head``.
        x: Images, batch first.
        groups: Number of equal slices.

    Returns:
        Raw embeddings in the order of ``x``, shape (n, dim).

    Raises:
        ValueError: If the batch does not divide into the groups.
    """
    size, rest = divmod(x.shape[0], groups)
    if rest:
        raise ValueError(f"batch {x.shape[0]} does not divide into {groups} groups")
    outputs = []
    with one_update_of_statistics(net, groups):
        for g in range(groups):
            part = x[g * size : (g + 1) * size]
            outputs.append(net["head"](net["backbone"](part)))
    return torch.cat(outputs)


def shuffled_keys(net: nn.ModuleDict, x: Tensor, permutation: Tensor, groups: int) -> Tensor:
    """Embeds the keys with ShuffleBN: permute the batch, embed it slice by slice, restore the order.

    Args:
        net: Entries ``backbone`` and ``head``.
        x: Images, batch first.
        permutation: Position j of the shuffled batch holds image permutation[j].
        groups: Number of equal slices.

    Returns:
        Raw keys in the order of ``x``, shape (n, dim), without graph.
    """
    with torch.no_grad():
        shuffled = grouped_forward(net, x[permutation], groups)
        keys = torch.empty_like(shuffled)
        for j, source in enumerate(permutation.tolist()):
            keys[source] = shuffled[j]
    return keys


def move_teacher(teacher: nn.Module, student: nn.Module, m: float) -> None:
    """Sets every teacher parameter to m * teacher + (1 - m) * student; buffers stay.

    Args:
        teacher: Module to change, with the same structure as the student.
        student: Module to read.
        m: Teacher momentum.
    """
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.copy_(old * m + new * (1.0 - m))


def push_keys(queue: Tensor, pointer: int, keys: Tensor) -> int:
    """Writes unit-norm keys into the queue, one column each, wrapping wherever the end falls.

    Args:
        queue: Shape (dim, K), changed in place.
        pointer: First column to write.
        keys: Raw keys, shape (n, dim).

    Returns:
        The new pointer.
    """
    for key in l2_rows(keys):
        queue[:, pointer] = key.to(queue.dtype)
        pointer = (pointer + 1) % queue.shape[1]
    return pointer


def train_moco(
    backbone: nn.Module,
    head: nn.Module,
    queue: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    permutations: Sequence[Tensor],
    groups: int,
    lr: float | Sequence[float],
    weight_decay: float,
    sgd_momentum: float,
    teacher_momentum: float,
    temperature: float,
) -> MocoRun:
    """Trains with the teacher moving at the end of each step.

    Step t: keys from the teacher (a copy of the student at t = 0), loss against the queue, SGD, teacher move
    with the student just updated, keys of this step pushed. Module and queue arguments are copied, never
    changed.

    Args:
        backbone: Trunk of the student.
        head: Projector of the student.
        queue: Initial queue, shape (dim, K), unit-norm columns.
        batches: For every step the query images and the key images of the global batch.
        permutations: For every step the permutation of the global key batch.
        groups: Number of virtual GPUs.
        lr: SGD learning rate, constant or one per step.
        weight_decay: SGD weight decay, on every student parameter.
        sgd_momentum: SGD momentum.
        teacher_momentum: Constant EMA momentum m.
        temperature: Softmax temperature.

    Returns:
        Losses and final state.
    """
    return _train(
        backbone,
        head,
        queue,
        batches,
        permutations,
        groups,
        lr,
        weight_decay,
        sgd_momentum,
        teacher_momentum,
        temperature,
        teacher_first=False,
    )


def train_moco_official_order(
    backbone: nn.Module,
    head: nn.Module,
    queue: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    permutations: Sequence[Tensor],
    groups: int,
    lr: float | Sequence[float],
    weight_decay: float,
    sgd_momentum: float,
    teacher_momentum: float,
    temperature: float,
) -> MocoRun:
    """Trains with the teacher moving inside the forward pass, before the keys, as the official program does.

    Let s_t be the student before step t. Here the keys of step t come from T_t = m T_(t-1) + (1 - m) s_t,
    where T_(-1) = s_0 makes the move of step 0 a no-op up to rounding. ``train_moco`` moves with s_(t+1)
    after step t, so its keys of step t also come from a teacher that has absorbed s_0 .. s_t: losses,
    students, queues, pointers and BN buffers agree at every step. Only the final teacher parameters differ:
    here s_n is not mixed in yet, so after n steps they equal those of ``train_moco`` after n - 1 steps, and
    one more move gives those after n.

    Args:
        backbone: As for ``train_moco``.
        head: As for ``train_moco``.
        queue: As for ``train_moco``.
        batches: As for ``train_moco``.
        permutations: As for ``train_moco``.
        groups: As for ``train_moco``.
        lr: As for ``train_moco``.
        weight_decay: As for ``train_moco``.
        sgd_momentum: As for ``train_moco``.
        teacher_momentum: As for ``train_moco``.
        temperature: As for ``train_moco``.

    Returns:
        Losses and final state.
    """
    return _train(
        backbone,
        head,
        queue,
        batches,
        permutations,
        groups,
        lr,
        weight_decay,
        sgd_momentum,
        teacher_momentum,
        temperature,
        teacher_first=True,
    )


def _train(
    backbone: nn.Module,
    head: nn.Module,
    queue: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    permutations: Sequence[Tensor],
    groups: int,
    lr: float | Sequence[float],
    weight_decay: float,
    sgd_momentum: float,
    teacher_momentum: float,
    temperature: float,
    teacher_first: bool,
) -> MocoRun:
    """Runs either order; see the two public functions.

    The SGD update is g = grad + weight_decay * p; v = g at first, then sgd_momentum * v + g; p = p - lr * v.
    """
    student = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(head)}).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    queue = queue.clone()
    pointer = 0
    losses = []
    rates = lr if isinstance(lr, Sequence) else [lr] * len(batches)
    velocities: dict[str, Tensor] = {}
    for (x_q, x_k), permutation, rate in zip(batches, permutations, rates, strict=True):
        q = grouped_forward(student, x_q, groups)
        if teacher_first:
            move_teacher(teacher, student, teacher_momentum)
        k = shuffled_keys(teacher, x_k, permutation, groups)
        loss, _ = moco_logits_loss(q, k, queue, temperature)
        student.zero_grad()
        torch.autograd.backward(loss)
        with torch.no_grad():
            for name, p in student.named_parameters():
                if p.grad is None:
                    continue
                g = p.grad + weight_decay * p
                velocities[name] = sgd_momentum * velocities[name] + g if name in velocities else g
                p.sub_(rate * velocities[name])
        if not teacher_first:
            move_teacher(teacher, student, teacher_momentum)
        pointer = push_keys(queue, pointer, k)
        losses.append(loss.item())
    return MocoRun(losses, dict(student.state_dict()), dict(teacher.state_dict()), queue, pointer)
