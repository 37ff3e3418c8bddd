"""Naive instance discrimination: the memory bank, NCE with a constant Z, full softmax, and the loop.

Conventions: the state dict has the prefixes ``backbone.`` and ``projector.``. The bank has one row per sample
of the data set, shape (n, d). Its rows start without being normalised and are used as they are. Which rows
serve as negatives is an input. Modules run in train mode; ranks are emulated as one global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import OptimizerFactory, copied_student, gradient_step, state_of, trainable
from .formulas import l2_rows

EPS = 1e-7


@dataclass(frozen=True)
class InstDiscRun:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict of backbone and projector.
        bank: Final bank, shape (n, d).
        z: Normalising constant fixed by the first batch; None in full-softmax mode.
    """

    losses: list[float]
    student: dict[str, Tensor]
    bank: Tensor
    z: float | None


def bank_bound(dim: int) -> float:
    """Half-width s = 1 / sqrt(dim / 3) of the initial distribution U(-s, s); the expected squared norm of a row is one.

    Args:
        dim: Embedding width.

    Returns:
        The bound.
    """
    return 1.0 / math.sqrt(dim / 3.0)


def initial_bank(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draws a bank from U(-s, s), not normalised.

    Args:
        n: Samples in the data set.
        dim: Embedding width.
        generator: Source of the draws.

    Returns:
        Float64 tensor of shape (n, dim).
    """
    return (2.0 * torch.rand(n, dim, dtype=torch.float64, generator=generator) - 1.0) * bank_bound(dim)


def nce_columns(sample_ids: Tensor, negatives: Tensor) -> Tensor:
    """Bank rows each query is compared with: its own row in column 0, negative j in column j + 1.

    Args:
        sample_ids: Data set index of every sample, shape (B,).
        negatives: Drawn bank rows, shape (B, K). Hits on the sample itself and repeats are kept.

    Returns:
        Index tensor of shape (B, 1 + K).
    """
    return torch.cat([sample_ids.reshape(-1, 1), negatives], dim=1)


def nce_exponentials(features: Tensor, bank: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """exp(<v, f> / T) for the normalised features and the chosen bank rows.

    Args:
        features: Raw embeddings, shape (B, d). Gradient flows here only.
        bank: Shape (n, d).
        columns: Bank rows per sample, shape (B, 1 + K).
        temperature: Softmax temperature.

    Returns:
        Float64 tensor of shape (B, 1 + K).
    """
    f = l2_rows(features)
    memory = bank.double().detach()
    rows = []
    for i in range(f.shape[0]):
        rows.append(torch.stack([(memory[j] * f[i]).sum() for j in columns[i].tolist()]))
    return torch.exp(torch.stack(rows) / temperature)


def first_batch_z(exponentials: Tensor, n: int) -> float:
    """Normalising constant: mean of the first batch's exponentials, positives included, times n.

    Args:
        exponentials: Shape (B, 1 + K).
        n: Samples in the data set.

    Returns:
        Z, a constant without gradient.
    """
    return exponentials.detach().mean().item() * n


def nce_loss(exponentials: Tensor, z: float, n: int) -> Tensor:
    """NCE: the positive against K / n, the K negatives against the same noise mass, divided by B.

    Args:
        exponentials: Shape (B, 1 + K), positive in column 0.
        z: Normalising constant.
        n: Samples in the data set.

    Returns:
        Scalar.
    """
    p = exponentials / z
    batch, width = p.shape
    noise = (width - 1) / n
    total = torch.zeros((), dtype=p.dtype)
    for i in range(batch):
        total = total + torch.log(p[i, 0] / (p[i, 0] + noise + EPS))
        for j in range(1, width):
            total = total + torch.log(noise / (p[i, j] + noise + EPS))
    return -total / batch


def full_softmax_loss(features: Tensor, bank: Tensor, sample_ids: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over all rows of the bank, the form for nce-k 0.

    Args:
        features: Raw embeddings, shape (B, d). Gradient flows here only.
        bank: Shape (n, d).
        sample_ids: Data set index of every sample, shape (B,).
        temperature: Softmax temperature.

    Returns:
        Float64 scalar, the batch mean.
    """
    logits = l2_rows(features) @ bank.double().detach().T / temperature
    total = torch.zeros((), dtype=torch.float64)
    for i, sample in enumerate(sample_ids.tolist()):
        total = total + torch.logsumexp(logits[i], dim=0) - logits[i, sample]
    return total / len(sample_ids)


def move_bank(bank: Tensor, sample_ids: Tensor, features: Tensor, momentum: float = 0.5) -> None:
    """Sets every touched row to normalise(momentum * old + (1 - momentum) * new).

    A sample that occurs twice starts from the old row both times, and its last occurrence wins.

    Args:
        bank: Shape (n, d), changed in place.
        sample_ids: Data set index of every sample, shape (B,).
        features: Raw embeddings, shape (B, d); normalised here.
        momentum: Share of the old row.
    """
    before = bank.double().clone()
    f = l2_rows(features.detach())
    for i, sample in enumerate(sample_ids.tolist()):
        mixed = momentum * before[sample] + (1.0 - momentum) * f[i]
        bank[sample] = l2_rows(mixed.reshape(1, -1))[0].to(bank.dtype)


def train_instdisc(
    backbone: nn.Module,
    projector: nn.Module,
    bank: Tensor,
    batches: Sequence[Tensor],
    sample_ids: Sequence[Tensor],
    negatives: Sequence[Tensor] | None,
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    bank_momentum: float = 0.5,
) -> InstDiscRun:
    """Trains with NCE, or with the full softmax when there are no negatives.

    Step t: forward, loss against the bank as it is, backward, optimizer at lrs[t], bank rows of the batch moved
    with the embeddings of this forward. Z is fixed from the exponentials of step 0.

    Args:
        backbone: Trunk; copied, as are projector and bank.
        projector: Projector; its output is normalised.
        bank: Initial bank, shape (n, d).
        batches: For every step the images, shape (B, ...).
        sample_ids: For every step the data set index of every image, shape (B,).
        negatives: For every step the drawn bank rows, shape (B, K), see ``nce_columns``; None for the full
            softmax.
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable parameters, in module order.
        lrs: Learning rate of every step.
        bank_momentum: Share of the old row in an update.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector)
    optimizer = optimizer_factory(trainable(student))
    bank = bank.clone()
    n = bank.shape[0]
    z: float | None = None
    losses = []
    for step, (images, ids, lr) in enumerate(zip(batches, sample_ids, lrs, strict=True)):
        features = student["projector"](student["backbone"](images))
        if negatives is None:
            loss = full_softmax_loss(features, bank, ids, temperature)
        else:
            exponentials = nce_exponentials(features, bank, nce_columns(ids, negatives[step]), temperature)
            z = first_batch_z(exponentials, n) if z is None else z
            loss = nce_loss(exponentials, z, n)
        gradient_step(optimizer, loss, lr)
        move_bank(bank, ids, features, bank_momentum)
        losses.append(loss.item())
    return InstDiscRun(losses, state_of(student), bank, z)
