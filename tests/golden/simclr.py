"""Naive SimCLR: NT-Xent, the projection head, LARS with the learning rate inside the buffer, and the loop.

Conventions: the state dict of the student has the prefixes ``backbone.`` and ``projector.``. Modules run in
train mode. Ranks are emulated as one global batch, as with cross-replica BN and an autograd-aware gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .common import OptimizerFactory, copied_student, gradient_step, state_of, trainable
from .formulas import l2_rows


@dataclass(frozen=True)
class SimclrRun:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update, in the summed form.
        student: Final state dict of backbone and projector.
    """

    losses: list[float]
    student: dict[str, Tensor]


def nt_xent_naive(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent by a double loop over the 2N embeddings, in the form mean over view 1 + mean over view 2.

    The candidates of an embedding are all 2N embeddings except itself; the positive is the other view of the
    same sample. The result is twice the mean over all 2N rows.

    Args:
        z1: Raw embeddings of view 1, shape (N, d).
        z2: Raw embeddings of view 2, shape (N, d).
        temperature: Softmax temperature.

    Returns:
        Float64 scalar. Gradient flows to both views, as queries and as candidates.
    """
    n = z1.shape[0]
    rows = torch.cat([l2_rows(z1), l2_rows(z2)])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        denominator = torch.zeros((), dtype=torch.float64)
        for j in range(2 * n):
            if j != i:
                denominator = denominator + torch.exp((rows[i] * rows[j]).sum() / temperature)
        total = total + torch.log(denominator) - (rows[i] * rows[positive]).sum() / temperature
    return total / n


def nt_xent_rank(
    z1: Tensor,
    z2: Tensor,
    all1: Tensor,
    all2: Tensor,
    temperature: float,
    rank: int = 0,
) -> Tensor:
    """NT-Xent of one rank: local rows against the candidates of all ranks.

    Row i of view 1 is classified among [view 2 of all samples, view 1 of all samples without itself] with
    label i + n * rank, and likewise for view 2.

    Args:
        z1: Raw local embeddings of view 1, shape (n, d).
        z2: Raw local embeddings of view 2, shape (n, d).
        all1: Raw embeddings of view 1 of all ranks in rank order, shape (N, d).
        all2: Raw embeddings of view 2 of all ranks in rank order, shape (N, d).
        temperature: Softmax temperature.
        rank: Index of this rank.

    Returns:
        Float64 scalar: mean over the local rows of view 1 plus the same of view 2.
    """
    a, b, gathered_a, gathered_b = l2_rows(z1), l2_rows(z2), l2_rows(all1), l2_rows(all2)
    n = a.shape[0]
    labels = torch.arange(n) + n * rank
    itself = nn.functional.one_hot(labels, gathered_a.shape[0]).bool()

    def one_view(query: Tensor, other: Tensor, own: Tensor) -> Tensor:
        across = query @ other.T / temperature
        within = (query @ own.T / temperature).masked_fill(itself, -float("inf"))
        return nn.functional.cross_entropy(torch.cat([across, within], dim=1), labels)

    return one_view(a, gathered_b, gathered_a) + one_view(b, gathered_a, gathered_b)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of the whole batch with matrix products; the same number as ``nt_xent_naive``.

    Args:
        z1: Raw embeddings of view 1, shape (N, d).
        z2: Raw embeddings of view 2, shape (N, d).
        temperature: Softmax temperature.

    Returns:
        Float64 scalar, mean over view 1 plus mean over view 2.
    """
    return nt_xent_rank(z1, z2, z1, z2, temperature)


def nt_xent_mean(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as the paper writes it, the mean over all 2N rows: half of ``nt_xent``.

    Args:
        z1: Raw embeddings of view 1, shape (N, d).
        z2: Raw embeddings of view 2, shape (N, d).
        temperature: Softmax temperature.

    Returns:
        Float64 scalar.
    """
    rows = torch.cat([l2_rows(z1), l2_rows(z2)])
    n = z1.shape[0]
    logits = (rows @ rows.T / temperature).fill_diagonal_(-float("inf"))
    return nn.functional.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))


def simclr_projector(features: int = 2048, out: int = 128, layers: int = 3) -> nn.Sequential:
    """SimCLR's projection head: bias-free linear layers, each followed by BN, with ReLU between.

    The hidden layers are as wide as the trunk. The last BN has a scale and no offset: its bias is zero and
    does not require a gradient. Names for two layers: ``0.weight``, ``1.*``, ``3.weight``, ``4.*``; for
    three: ``0.weight``, ``1.*``, ``3.weight``, ``4.*``, ``6.weight``, ``7.*``.

    Args:
        features: Width of the trunk and of the hidden layers.
        out: Embedding width.
        layers: Number of linear layers, 2 (first paper) or 3 (default of the official program).

    Returns:
        The head.

    Raises:
        ValueError: If layers is neither 2 nor 3.
    """
    if layers not in (2, 3):
        raise ValueError(f"a SimCLR head has 2 or 3 layers, not {layers}")
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    last_norm = nn.BatchNorm1d(out)
    last_norm.bias.requires_grad_(False)
    modules += [nn.Linear(features, out, bias=False), last_norm]
    return nn.Sequential(*modules)


class NaiveSimclrLars(Optimizer):
    """LARS of SimCLR: v = momentum v + lr * trust * (g + wd p); p = p - v.

    The learning rate of a step is stored in the buffer, so a later change of it does not rescale older
    gradients. Weight decay and trust ratio apply to tensors of more than one dimension only, which are the
    ones left after excluding biases and BN.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, wd: float, momentum: float = 0.9, eta: float = 1e-3
    ) -> None:
        """Stores the settings.

        Args:
            params: Parameters to train.
            lr: Learning rate.
            wd: Weight decay.
            momentum: Momentum of the buffer.
            eta: Trust coefficient.
        """
        super().__init__(list(params), {"lr": lr, "wd": wd, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.clone()
                trust = 1.0
                if p.ndim > 1:
                    g += group["wd"] * p
                    p_norm, g_norm = p.norm().item(), g.norm().item()
                    if p_norm > 0 and g_norm > 0:
                        trust = group["eta"] * p_norm / g_norm
                scaled = group["lr"] * trust * g
                state = self.state[p]
                state["v"] = group["momentum"] * state["v"] + scaled if "v" in state else scaled
                p.sub_(state["v"])


def train_simclr(
    backbone: nn.Module,
    projector: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
) -> SimclrRun:
    """Trains with NT-Xent. Step t: one forward over [view 1, view 2], loss, backward, optimizer at lrs[t].

    Args:
        backbone: Trunk; copied, as is the projector.
        projector: Projector.
        batches: For every step the global batch of view 1 and of view 2, shape (N, ...) each.
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable parameters, in module order.
        lrs: Learning rate of every step.

    Returns:
        Losses and final state.
    """
    student = copied_student(backbone=backbone, projector=projector)
    optimizer = optimizer_factory(trainable(student))
    losses = []
    for (view1, view2), lr in zip(batches, lrs, strict=True):
        z = student["projector"](student["backbone"](torch.cat([view1, view2])))
        n = view1.shape[0]
        loss = nt_xent(z[:n], z[n:], temperature)
        gradient_step(optimizer, loss, lr)
        losses.append(loss.item())
    return SimclrRun(losses, state_of(student))
