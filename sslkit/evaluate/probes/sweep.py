"""Many linear heads trained in one pass over frozen features: a grid of rates, weight decays and norms.

A probe's score depends on its rate more than on anything else, and the best rate on the scale of the features. So all
are trained at once, on the same batches, and one is chosen on images held out of the training set.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from sslkit.errors import UserError
from sslkit.evaluate.input_checks import as_features, check_rates, check_seed

HELD_OUT = 0.1
SCORED_AT_ONCE = 1024
MOMENTUM = 0.9


@dataclass(frozen=True)
class SweepProtocol:
    """The grid, and how its heads are trained: SGD with momentum 0.9, cosine to 0 by step, weights from N(0, 0.01).

    Attributes:
        lrs: Peak rates at a batch of 256; they grow with the batch.
        weight_decays: L2 penalties.
        norms: Whether a BatchNorm without parameters stands before the head (MAE, arXiv:2111.06377, appendix A.1).
        epochs: Passes over the features.
        batch_size: Features of an update.
        seed: Of held-out draw, initialisation and order.
    """

    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-5)
    norms: tuple[bool, ...] = (False, True)
    epochs: int = 50
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_rates(self.lrs, "linear sweep, --lr")
        check_rates(self.weight_decays, "linear sweep, --weight-decay", zero=True)
        check_seed(self.seed, "linear sweep, --seed")
        if self.epochs < 1 or self.batch_size < 2:
            raise UserError(
                f"linear sweep: needs an epoch and two images a batch, not {self.epochs} and {self.batch_size}"
            )


@dataclass(frozen=True)
class Head:
    """One point of the grid and its score on the held-out images."""

    reading: str
    lr: float
    weight_decay: float
    norm: bool
    held_out: float


@dataclass(frozen=True)
class SweepScore:
    """Test accuracy of the head that was best on the held-out images; and the whole grid, best first."""

    accuracy: float
    chosen: Head
    grid: list[Head]


class _Heads:
    """All heads of one kind of features and one choice of norm, their weights side by side: (D, classes x heads).

    On a CPU two matrix products are nearly all of an update, so the rest takes few passes over the weights: SGD's
    velocities are kept times their rates, and a product adds itself to them.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        settings: Sequence[tuple[float, float]],
        norm: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        one = torch.empty(width, classes).normal_(0.0, 0.01, generator=generator)
        self.classes, self.norm, self.settings = classes, norm, settings
        self.weight = one.to(device).repeat_interleave(len(settings), dim=1)
        self.bias = torch.zeros(classes * len(settings), device=device)
        self.moving = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lr, decay = torch.tensor(settings, device=device).repeat(classes, 1).T
        self.shrinking = self.lr * decay if decay.any() else None
        self.mean, self.variance = torch.zeros(width, device=device), torch.ones(width, device=device)

    def logits(self, features: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs (B, D) as the heads see them, and logits (B, classes, heads)."""
        if self.norm:
            features = batch_norm(features, self.mean, self.variance, training=training)
        outputs = torch.addmm(self.bias, features, self.weight)
        return features, outputs.view(len(features), self.classes, -1)

    def update(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step of SGD for every head; the gradient of a softmax regression is short enough to write down."""
        inputs, logits = self.logits(features, training=True)
        # CPUs are ten times slower on numbers as small as a saturated softmax has.
        error = torch.threshold_(logits.softmax(dim=1), 1e-20, 0.0)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        error = error.flatten(1).mul_(self.lr / len(labels))
        of_weight, of_bias = self.moving
        of_weight.addmm_(inputs.T, error, beta=MOMENTUM)
        of_bias.mul_(MOMENTUM).add_(error.sum(dim=0))
        for param, moving in zip((self.weight, self.bias), self.moving, strict=True):
            if self.shrinking is not None:
                moving.addcmul_(param, self.shrinking)
            param.sub_(moving, alpha=factor)

    def scores(self, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
        """Accuracy and, to tell equals apart, minus the loss of each head."""
        right, losses = [], []
        for rows, truth in zip(features.split(SCORED_AT_ONCE), labels.split(SCORED_AT_ONCE), strict=True):
            truth = truth.to(self.weight.device)
            logits = self.logits(rows.to(self.weight.device))[1]
            right.append((logits.argmax(dim=1) == truth[:, None]).sum(dim=0))
            likelihoods = logits.log_softmax(dim=1)[torch.arange(len(truth), device=truth.device), truth]
            losses.append(-likelihoods.double().sum(dim=0))
        shares = torch.stack(right).sum(dim=0) / len(labels)
        means = torch.stack(losses).sum(dim=0) / len(labels)
        return [
            (share, -loss if math.isfinite(loss) else -math.inf)
            for share, loss in zip(shares.tolist(), means.tolist(), strict=True)
        ]


@torch.no_grad()
def sweep(
    train: dict[str, Tensor], labels: Tensor, test: dict[str, Tensor], truth: Tensor, protocol: SweepProtocol
) -> SweepScore:
    """Train the whole grid, choose on held-out images, score the chosen head on the test set.

    Args:
        train: By reading (layer, pooling), (N, D) features.
        labels: (N,) int64.
        test: (Q, D) features for each reading.
        truth: (Q,) int64.
        protocol: The grid, trained on a GPU if there is one; features stay where they are but for a batch.

    Raises:
        UserError: An empty grid, features that are not finite, or fewer than three training images.
    """
    if not (protocol.lrs and protocol.weight_decays and protocol.norms and train):
        raise UserError("linear sweep: the grid is empty; give at least one rate, weight decay and reading")
    if len(labels) < 3:
        raise UserError(f"linear sweep: needs at least three training images, not {len(labels)}")
    train = {reading: as_features(features, f"linear sweep, train, {reading}") for reading, features in train.items()}
    test = {reading: as_features(features, f"linear sweep, test, {reading}") for reading, features in test.items()}
    classes = int(max(labels.max(), truth.max())) + 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(protocol.seed))
    held_out = max(round(len(labels) * HELD_OUT), 1)
    choose, fit = order[:held_out], order[held_out:]
    scale = protocol.batch_size / 256
    settings = [(lr * scale, decay) for lr, decay in itertools.product(protocol.lrs, protocol.weight_decays)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = {
        (reading, norm): _Heads(features.shape[1], classes, settings, norm, protocol.seed, device)
        for reading, features in train.items()
        for norm in protocol.norms
    }
    _train(heads, train, labels, fit, protocol, device)
    ranked: list[tuple[tuple[float, float], Head, int]] = []
    for (reading, norm), group in heads.items():
        for place, score in enumerate(group.scores(train[reading][choose], labels[choose])):
            lr, decay = settings[place]
            ranked.append((score, Head(reading, lr / scale, decay, norm, score[0]), place))
    ranked.sort(key=lambda item: item[0], reverse=True)
    _, best, place = ranked[0]
    accuracy = heads[best.reading, best.norm].scores(test[best.reading], truth)[place][0]
    return SweepScore(accuracy, best, [head for _, head, _ in ranked])


def _train(
    heads: dict[tuple[str, bool], _Heads],
    train: dict[str, Tensor],
    labels: Tensor,
    fit: Tensor,
    protocol: SweepProtocol,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(protocol.seed + 1)
    steps, step = protocol.epochs * -(-len(fit) // protocol.batch_size), 0
    for _ in range(protocol.epochs):
        for rows in fit[torch.randperm(len(fit), generator=generator)].split(protocol.batch_size):
            factor = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            step += 1
            if len(rows) == 1:  # no batch statistics of one
                continue
            batches, truth = (
                {name: features[rows].to(device) for name, features in train.items()},
                labels[rows].to(device),
            )
            for (reading, _), group in heads.items():
                group.update(batches[reading], truth, factor)
