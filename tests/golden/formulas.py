"""Naive float64 transcriptions of the MoCo v1/v2/v3 formulas.

Everything is written for legibility, not speed: explicit Python loops over rows, parameters and steps.
Features are always given raw (not normalised) with one sample per row; the losses normalise them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORM_FLOOR = 1e-12


def l2_rows(x: Tensor) -> Tensor:
    """Divides every row by its Euclidean norm, in float64.

    Args:
        x: Matrix of shape (n, d).

    Returns:
        Float64 matrix of shape (n, d) whose non-zero rows have norm one.
    """
    rows = x.double()
    norms = (rows * rows).sum(dim=1, keepdim=True).sqrt()
    return rows / norms.clamp_min(NORM_FLOOR)


def moco_logits_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of MoCo v1/v2: one positive key per query against a queue of negatives.

    Args:
        q: Raw queries, shape (n, d). Gradient flows here only.
        k: Raw positive keys, shape (n, d).
        queue: Negatives as columns, shape (d, K), used as they are (assumed unit norm).
        temperature: Softmax temperature.

    Returns:
        The mean cross-entropy (scalar) and the logits of shape (n, 1 + K), positive in column 0.
    """
    queries = l2_rows(q)
    keys = l2_rows(k).detach()
    negatives = queue.double().detach()
    rows = []
    total = torch.zeros((), dtype=torch.float64)
    for i in range(queries.shape[0]):
        positive = (queries[i] * keys[i]).sum().reshape(1)
        others = (queries[i].unsqueeze(1) * negatives).sum(dim=0)
        row = torch.cat([positive, others]) / temperature
        rows.append(row)
        total = total + torch.logsumexp(row, dim=0) - row[0]
    return total / queries.shape[0], torch.stack(rows)


def moco_v3_ctr(q: Tensor, k: Tensor, temperature: float, rank: int = 0, world_size: int = 1) -> Tensor:
    """One direction of the MoCo v3 loss, as computed on one rank.

    Args:
        q: Raw predictions of this rank, shape (n_local, d). Gradient flows here only.
        k: Raw keys of all ranks in rank order, shape (n_local * world_size, d).
        temperature: Softmax temperature.
        rank: Index of this rank; the positive of local row i is key i + n_local * rank.
        world_size: Number of ranks.

    Returns:
        Scalar: mean cross-entropy over the local rows times 2 * temperature.

    Raises:
        ValueError: If the number of keys is not n_local * world_size.
    """
    n_local = q.shape[0]
    if k.shape[0] != n_local * world_size:
        raise ValueError(f"{k.shape[0]} keys do not fit {world_size} ranks of {n_local} queries")
    queries = l2_rows(q)
    keys = l2_rows(k).detach()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n_local):
        row = torch.stack([torch.dot(queries[i], key) for key in keys]) / temperature
        total = total + torch.logsumexp(row, dim=0) - row[i + n_local * rank]
    return 2.0 * temperature * total / n_local


def moco_v3_loss(
    q1: Tensor, k2: Tensor, q2: Tensor, k1: Tensor, t: float, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Symmetric MoCo v3 loss: ctr(q1, k2) + ctr(q2, k1), summed and not averaged.

    Args:
        q1: Raw predictions of view 1, shape (n_local, d).
        k2: Raw keys of view 2 of all ranks, shape (n_local * world_size, d).
        q2: Raw predictions of view 2, shape (n_local, d).
        k1: Raw keys of view 1 of all ranks, shape (n_local * world_size, d).
        t: Softmax temperature.
        rank: Index of this rank.
        world_size: Number of ranks.

    Returns:
        Scalar loss of this rank.
    """
    return moco_v3_ctr(q1, k2, t, rank, world_size) + moco_v3_ctr(q2, k1, t, rank, world_size)


def log_mean_exp_similarity(d: int, t: float) -> float:
    """Exact ln E[exp(s / t)] for s the cosine of two independent uniform directions in d dimensions.

    E = Gamma(d/2) (2t)^(d/2-1) I_(d/2-1)(1/t). With the power series of the Bessel function I the prefactors
    cancel and leave sum_j Gamma(d/2) / (j! Gamma(j + d/2)) (1 / (2t))^(2j), summed here in logarithms.

    Args:
        d: Dimension.
        t: Temperature.

    Returns:
        The natural logarithm of the expectation.
    """
    terms = [
        math.lgamma(d / 2) - math.lgamma(j + 1) - math.lgamma(j + d / 2) - 2 * j * math.log(2 * t)
        for j in range(50 + math.ceil(4 / t))
    ]
    peak = max(terms)
    return peak + math.log(math.fsum(math.exp(term - peak) for term in terms))


def chance_level(K: int, d: int, t: float) -> float:  # noqa: N803
    """Expected InfoNCE of random unit vectors against K candidates: ln K + ln E[exp(s / t)].

    Multiply by 4 * t for the symmetric MoCo v3 loss, with K the global batch.

    Args:
        K: Number of candidates.
        d: Feature dimension.
        t: Softmax temperature.

    Returns:
        The chance level in nats.
    """
    return math.log(K) + log_mean_exp_similarity(d, t)


def step_decay_lr(epoch: int, base_lr: float, milestones: Sequence[int] = (120, 160), factor: float = 0.1) -> float:
    """MoCo v1 learning rate, constant within an epoch: times ``factor`` from each milestone on.

    Args:
        epoch: Zero-based epoch.
        base_lr: Initial learning rate.
        milestones: Epochs from which a further decay applies.
        factor: Decay factor.

    Returns:
        The learning rate of this epoch.
    """
    lr = base_lr
    for milestone in milestones:
        if epoch >= milestone:
            lr = lr * factor
    return lr


def cosine_epoch_lr(epoch: int, epochs: int, base_lr: float) -> float:
    """MoCo v2 learning rate, constant within an epoch, without warmup.

    Args:
        epoch: Zero-based epoch.
        epochs: Total number of epochs.
        base_lr: Initial learning rate.

    Returns:
        The learning rate of this epoch.
    """
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def warmup_cosine_lr(e: float, warmup: float, epochs: float, peak_lr: float) -> float:
    """MoCo v3 learning rate at a fractional epoch.

    Args:
        e: epoch + iteration / iterations_per_epoch.
        warmup: Warmup length in epochs.
        epochs: Total number of epochs.
        peak_lr: Peak learning rate, already scaled by batch / 256.

    Returns:
        The learning rate; zero at e = 0 when there is a warmup.
    """
    if e < warmup:
        return peak_lr * e / warmup
    return peak_lr * 0.5 * (1.0 + math.cos(math.pi * (e - warmup) / (epochs - warmup)))


def cosine_momentum(e: float, E: float, m0: float) -> float:  # noqa: N803
    """MoCo v3 teacher momentum, growing from ``m0`` to one.

    Args:
        e: epoch + iteration / iterations_per_epoch.
        E: Total number of epochs.
        m0: Momentum at e = 0.

    Returns:
        The momentum at e.
    """
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * e / E)) * (1.0 - m0)


def sincos2d(h: int, w: int, dim: int, class_row: bool = False) -> Tensor:
    """Fixed 2-D sine-cosine position table in row-major patch order.

    The patch at row a and column b gets [sin(a w), cos(a w), sin(b w), cos(b w)], w_j = 10000^(-j / (dim /
    4)). The official code agrees on square grids only; on other grids it walks the columns first.

    Args:
        h: Rows of the grid.
        w: Columns of the grid.
        dim: Width of the table, a multiple of four.
        class_row: Whether to put a zero row for the class token in front.

    Returns:
        Float64 table of shape (h * w, dim), or (1 + h * w, dim) with the class row.

    Raises:
        ValueError: If dim is not a multiple of four.
    """
    if dim % 4:
        raise ValueError(f"dim {dim} is not a multiple of 4")
    quarter = dim // 4
    omegas = [10000.0 ** (-j / quarter) for j in range(quarter)]
    table = [[0.0] * dim] if class_row else []
    for a in range(h):
        for b in range(w):
            row = [math.sin(a * omega) for omega in omegas] + [math.cos(a * omega) for omega in omegas]
            row += [math.sin(b * omega) for omega in omegas] + [math.cos(b * omega) for omega in omegas]
            table.append(row)
    return torch.tensor(table, dtype=torch.float64)


def lars_steps(
    params: Sequence[Tensor],
    grads_per_step: Sequence[Sequence[Tensor]],
    lr: float,
    wd: float,
    momentum: float,
    eta: float,
) -> list[Tensor]:
    """Runs the MoCo v3 form of LARS for given gradients.

    Tensors with more than one dimension get weight decay and the trust ratio (one when either norm is zero);
    the others get plain momentum SGD. The learning rate is applied after the momentum buffer.

    Args:
        params: Start values.
        grads_per_step: For every step one gradient per parameter.
        lr: Learning rate.
        wd: Weight decay.
        momentum: Momentum of the buffer.
        eta: Trust coefficient.

    Returns:
        New tensors with the values after the last step; the inputs are left alone.
    """
    values = [p.clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    for grads in grads_per_step:
        for i, grad in enumerate(grads):
            update = grad.clone()
            if values[i].ndim > 1:
                update = update + wd * values[i]
                p_norm, u_norm = values[i].norm().item(), update.norm().item()
                if p_norm > 0 and u_norm > 0:
                    update = update * (eta * p_norm / u_norm)
            buffers[i] = momentum * buffers[i] + update
            values[i] = values[i] - lr * buffers[i]
    return values


def ema_closed_form(initial: Tensor, student_trajectory: Sequence[Tensor], m: float) -> Tensor:
    """Teacher after n moves: m^n initial + (1 - m) sum_t m^(n-1-t) student_t.

    Args:
        initial: Teacher before the first move.
        student_trajectory: The student value mixed in by each of the n moves, in order.
        m: Constant teacher momentum.

    Returns:
        Float64 teacher value.
    """
    n = len(student_trajectory)
    result = m**n * initial.double()
    for step, student in enumerate(student_trajectory):
        result = result + (1.0 - m) * m ** (n - 1 - step) * student.double()
    return result
