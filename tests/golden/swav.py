"""Naive SwAV: Sinkhorn, swapped prediction, LARC, the queue of embeddings and the loop.

Conventions: the state dict has the prefixes ``backbone.``, ``projector.`` and ``prototypes.``. Crops are rows
of a batch, one tensor per crop, and the first two crops give the codes. Modules run in train mode. Ranks are
emulated as one global batch, as with SyncBN and a Sinkhorn whose sums run over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .common import OptimizerFactory, copied_student, gradient_step, state_of, trainable
from .formulas import l2_rows

ASSIGNMENT_CROPS = 2


@dataclass(frozen=True)
class SwavRun:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict; the prototypes are as the last update left them, not normalised again.
        queue: Final queues, shape (2, length, d), newest embeddings first; None if it never started.
        queue_used: For every step whether the queue took part in the Sinkhorn.
    """

    losses: list[float]
    student: dict[str, Tensor]
    queue: Tensor | None
    queue_used: list[bool]


def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignment of samples to prototypes with nearly equal prototype masses.

    Order: Q = exp(scores / epsilon) transposed; divided by its sum; then per iteration rows divided by their
    sums and by the number of prototypes, columns divided by their sums and by the number of samples; at the
    end times the number of samples, transposed back.

    Args:
        scores: Shape (B, P), one sample per row.
        epsilon: Sharpness.
        iterations: Number of row and column passes.

    Returns:
        Float64 codes of shape (B, P) without graph; every row sums to one when there is an iteration.
    """
    with torch.no_grad():
        q = torch.exp(scores.double() / epsilon).T.clone()
        prototypes, samples = q.shape
        q = q / q.sum()
        for _ in range(iterations):
            for k in range(prototypes):
                q[k] = q[k] / q[k].sum() / prototypes
            for b in range(samples):
                q[:, b] = q[:, b] / q[:, b].sum() / samples
        return (q * samples).T


def swapped_prediction_loss(codes: Sequence[Tensor], scores: Sequence[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of every code against the scores of all other crops, averaged twice.

    Args:
        codes: Codes of crop 0 and crop 1, shape (B, P) each; constants.
        scores: Scores of all crops, shape (B, P) each. Gradient flows here.
        temperature: Softmax temperature.

    Returns:
        Float64 scalar: mean over the codes of the mean over the other crops of the mean over the batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, code in enumerate(codes):
        of_code = torch.zeros((), dtype=torch.float64)
        for v, score in enumerate(scores):
            if v != i:
                log_p = torch.log_softmax(score.double() / temperature, dim=1)
                of_code = of_code - (code.detach() * log_p).sum(dim=1).mean()
        total = total + of_code / (len(scores) - 1)
    return total / len(codes)


def swav_loss(scores: Sequence[Tensor], temperature: float, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV loss without a queue: Sinkhorn on the first two crops, swapped prediction on all.

    Args:
        scores: Scores of all crops, shape (B, P) each, at least two crops.
        temperature: Softmax temperature.
        epsilon: Sharpness of the Sinkhorn.
        iterations: Number of Sinkhorn passes.

    Returns:
        Float64 scalar.
    """
    codes = [sinkhorn(score, epsilon, iterations) for score in scores[:ASSIGNMENT_CROPS]]
    return swapped_prediction_loss(codes, scores, temperature)


def swav_projector(features: int = 2048, hidden: int = 2048, out: int = 128) -> nn.Sequential:
    """SwAV head: Linear, BN, ReLU, Linear, both with bias; names ``0.*``, ``1.*``, ``3.*``.

    Args:
        features: Width of the trunk.
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        The head, without the normalisation that follows it.
    """
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class NaiveLarc(Optimizer):
    """Momentum SGD behind LARC without clipping, on every parameter, biases and BN included.

    g = trust |p| / (|g| + wd |p| + eps) * (g + wd p), or the bare g, without decay, when a norm is zero. Then
    v = momentum v + g and p = p - lr v.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        wd: float,
        momentum: float = 0.9,
        trust: float = 1e-3,
        eps: float = 1e-8,
    ) -> None:
        """Stores the settings.

        Args:
            params: Parameters to train.
            lr: Learning rate.
            wd: Weight decay.
            momentum: Momentum of the buffer.
            trust: Trust coefficient.
            eps: Added to the denominator.
        """
        super().__init__(list(params), {"lr": lr, "wd": wd, "momentum": momentum, "trust": trust, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.clone()
                p_norm, g_norm = p.norm().item(), g.norm().item()
                if p_norm != 0 and g_norm != 0:
                    adaptive = group["trust"] * p_norm / (g_norm + group["wd"] * p_norm + group["eps"])
                    g = (g + group["wd"] * p) * adaptive
                state = self.state[p]
                state["v"] = group["momentum"] * state["v"] + g if "v" in state else g
                p.sub_(group["lr"] * state["v"])


def resolution_groups(crops: Sequence[Tensor]) -> list[list[Tensor]]:
    """Cuts a list of crops where the image shape changes.

    Args:
        crops: Crops of one step, shape (B, ...) each.

    Returns:
        Consecutive crops of equal shape together, order kept; a shape that comes back starts a new group.
    """
    groups: list[list[Tensor]] = []
    for crop in crops:
        if groups and groups[-1][-1].shape[1:] == crop.shape[1:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    return groups


def embed_crops(student: nn.ModuleDict, crops: Sequence[Tensor]) -> Tensor:
    """One trunk pass per resolution group, one projector pass over everything, rows normalised.

    Args:
        student: Entries ``backbone`` and ``projector``.
        crops: Crops of one step, shape (B, ...) each.

    Returns:
        Float64 embeddings of shape (crops * B, d), crop by crop.
    """
    features = [student["backbone"](torch.cat(group)) for group in resolution_groups(crops)]
    return l2_rows(student["projector"](torch.cat(features)))


def assignment_codes(
    embeddings: Sequence[Tensor],
    scores: Sequence[Tensor],
    weight: Tensor,
    queue: Tensor | None,
    epsilon: float,
    iterations: int,
) -> tuple[list[Tensor], bool]:
    """Codes of the two assignment crops; afterwards their embeddings enter the queues.

    The scores of a queue (with the current prototypes) are put in front of those of the crop once the queue
    is full, that is once its last row is not zero. They are taken before the queue shifts.

    Args:
        embeddings: Normalised embeddings of every crop, shape (B, d) each.
        scores: Their scores, shape (B, P) each.
        weight: Prototypes, shape (P, d).
        queue: One queue per assignment crop, shape (2, length, d), newest first, changed in place; or None.
        epsilon: Sharpness of the Sinkhorn.
        iterations: Number of Sinkhorn passes.

    Returns:
        Two codes of shape (B, P), and whether the queue took part.
    """
    codes, used = [], False
    for i in range(ASSIGNMENT_CROPS):
        n = scores[i].shape[0]
        rows = scores[i].detach()
        if queue is not None:
            used = bool((queue[i, -1] != 0).any())
            if used:
                rows = torch.cat([queue[i] @ weight.detach().double().T, rows])
            queue[i, n:] = queue[i, :-n].clone()
            queue[i, :n] = embeddings[i].detach()
        codes.append(sinkhorn(rows, epsilon, iterations)[-n:])
    return codes, used


def train_swav(
    backbone: nn.Module,
    projector: nn.Module,
    prototypes: nn.Linear,
    batches_of_crops: Sequence[Sequence[Tensor]],
    temperature: float,
    epsilon: float,
    iterations: int,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    frozen_steps: int = 0,
    queue_length: int = 0,
    queue_start: int = 0,
) -> SwavRun:
    """Trains with swapped prediction.

    Step t: prototype rows normalised in place, forward, codes (see ``assignment_codes``), loss, backward, gradient
    of the prototypes dropped while t < frozen_steps, optimizer at lrs[t].

    Args:
        backbone: Trunk; copied, as are the other modules.
        projector: Head in front of the normalisation.
        prototypes: Linear layer without bias, weight of shape (P, d).
        batches_of_crops: For every step the crops of the global batch, shape (B, ...) each, codes from the
            first two.
        temperature: Softmax temperature.
        epsilon: Sharpness of the Sinkhorn.
        iterations: Number of Sinkhorn passes.
        optimizer_factory: Builds the optimizer from the trainable parameters, in module order.
        lrs: Learning rate of every step.
        frozen_steps: Steps at the start that leave the prototypes to the normalisation alone.
        queue_length: Rows of each of the two queues over all ranks, trimmed to a multiple of B; 0 for none.
        queue_start: First step at which embeddings enter the queue.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector, prototypes=prototypes)
    weight = student["prototypes"].weight
    assert isinstance(weight, nn.Parameter)
    optimizer = optimizer_factory(trainable(student))
    queue: Tensor | None = None
    losses, queue_used = [], []
    for step, (crops, lr) in enumerate(zip(batches_of_crops, lrs, strict=True)):
        n = crops[0].shape[0]
        rows = queue_length - queue_length % n
        if queue is None and rows and step >= queue_start:
            queue = torch.zeros(ASSIGNMENT_CROPS, rows, weight.shape[1], dtype=torch.float64)
        with torch.no_grad():
            weight.copy_(l2_rows(weight))
        embeddings = embed_crops(student, crops)
        scores = (embeddings @ weight.double().T).split(n)
        codes, used = assignment_codes(embeddings.split(n), scores, weight, queue, epsilon, iterations)
        loss = swapped_prediction_loss(codes, scores, temperature)
        gradient_step(optimizer, loss, lr, held=[weight] if step < frozen_steps else [])
        losses.append(loss.item())
        queue_used.append(used)
    return SwavRun(losses, state_of(student), queue, queue_used)
