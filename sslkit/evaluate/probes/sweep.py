"""A sweep of linear probes: learning rates, weight decays and norms, trained at the same time on frozen features.

The best learning rate depends on the scale of the features. All heads are trained on the same batches, and held-out
training images select one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from sslkit.distributed.collectives import upload
from sslkit.errors import UserError
from sslkit.evaluate.features.devices import evaluation_device, fits_on
from sslkit.evaluate.input_checks import as_features, check_rates, check_seed
from sslkit.evaluate.probes.knn import count_classes, share_of
from sslkit.evaluate.probes.linear import hold_out
from sslkit.progress import track

TEST_BATCH = 1024
MOMENTUM = 0.9

Settings = Sequence[tuple[float, float]]  # learning rate and weight decay of each head


@dataclass(frozen=True)
class SweepProtocol:
    """The grid of heads. They are trained by SGD with momentum 0.9 and a cosine decay to 0, from weights N(0, 0.01).

    Attributes:
        lrs: Peak learning rates at a batch size of 256, scaled with the batch size.
        weight_decays: L2 penalties.
        norms: Whether a BatchNorm without parameters precedes the head (MAE, arXiv:2111.06377, appendix A.1).
        epochs: Passes over the features.
        batch_size: Images per update.
        seed: Of held-out images, initialisation and order.
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
                f"linear sweep: needs at least 1 epoch and 2 images per batch, not {self.epochs} and {self.batch_size}"
            )


@dataclass(frozen=True)
class Head:
    """One head of the grid, and its accuracy on the held-out images."""

    readout: str
    lr: float
    weight_decay: float
    norm: bool
    held_out: float

    def row(self) -> dict[str, Any]:
        """The head as a row of the printed grid. Scripts read the readout as ``reading``."""
        settings = vars(self).copy()
        return {"reading": settings.pop("readout"), **settings}


@dataclass(frozen=True)
class SweepScore:
    """Test accuracy of the head that is best on the held-out images, that head, and the whole grid, best first."""

    accuracy: float
    chosen: Head
    grid: list[Head]
    correct: Tensor = field(compare=False, repr=False)  # (Q,) bool: which test images the chosen head has right


class _Heads:
    """The heads of one readout and one choice of norm, with their weights side by side: (D, classes x heads).

    On a CPU, nearly all of an update's time is two matrix products, so the rest makes few passes over the weights:
    the momentum buffers include the learning rates, and each product is accumulated into them.
    """

    def __init__(
        self, width: int, classes: int, settings: Settings, norm: bool, seed: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(width, classes).normal_(0.0, 0.01, generator=generator)
        self.classes, self.norm, self.settings = classes, norm, settings
        self.weight = weight.to(device).repeat_interleave(len(settings), dim=1)
        self.bias = torch.zeros(classes * len(settings), device=device)
        self.buffers = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lr, decay = torch.tensor(settings, device=device).repeat(classes, 1).T
        self.lr_times_decay = self.lr * decay if decay.any() else None
        self.mean, self.variance = torch.zeros(width, device=device), torch.ones(width, device=device)

    def logits(self, features: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs of the heads (B, D), after the norm, and logits (B, classes, heads)."""
        if self.norm:
            features = batch_norm(features, self.mean, self.variance, training=training)
        outputs = torch.addmm(self.bias, features, self.weight)
        return features, outputs.view(len(features), self.classes, -1)

    def update(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step of SGD for every head, with the gradient of the cross-entropy in closed form."""
        inputs, logits = self.logits(features, training=True)
        # CPUs are 10 times slower on subnormal numbers, which a saturated softmax returns.
        error = torch.threshold_(logits.softmax(dim=1), 1e-20, 0.0)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        error = error.flatten(1).mul_(self.lr / len(labels))
        weight_buffer, bias_buffer = self.buffers
        weight_buffer.addmm_(inputs.T, error, beta=MOMENTUM)
        bias_buffer.mul_(MOMENTUM).add_(error.sum(dim=0))
        for param, buffer in zip((self.weight, self.bias), self.buffers, strict=True):
            if self.lr_times_decay is not None:
                buffer.addcmul_(param, self.lr_times_decay)
            param.sub_(buffer, alpha=factor)

    def is_correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which images each head has right, (N, heads) bool on the CPU."""
        batches = (self.logits(rows.to(self.weight.device))[1] for rows in features.split(TEST_BATCH))
        return torch.cat([logits.argmax(dim=1).cpu() for logits in batches]) == labels.cpu()[:, None]

    def scores(self, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
        """Accuracy of each head, and minus its loss to break ties."""
        correct, losses = [], []
        for rows, truth in zip(features.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            truth = truth.to(self.weight.device)
            logits = self.logits(rows.to(self.weight.device))[1]
            correct.append((logits.argmax(dim=1) == truth[:, None]).sum(dim=0))
            log_likelihoods = logits.log_softmax(dim=1)[torch.arange(len(truth), device=truth.device), truth]
            losses.append(-log_likelihoods.double().sum(dim=0))
        accuracies = torch.stack(correct).sum(dim=0) / len(labels)
        means = torch.stack(losses).sum(dim=0) / len(labels)
        return [
            (accuracy, -loss if math.isfinite(loss) else -math.inf)
            for accuracy, loss in zip(accuracies.tolist(), means.tolist(), strict=True)
        ]


@torch.no_grad()
def sweep(
    train: dict[str, Tensor], labels: Tensor, test: dict[str, Tensor], truth: Tensor, protocol: SweepProtocol
) -> SweepScore:
    """Train all heads of the grid on features (N, D) of each readout, select one on held-out images, and test it.

    Trains on a GPU if there is one. Features are moved to it once, or, if it has no room for them, in batches. Raises
    `UserError` if the grid is empty, features are not finite, or there are fewer than three training images.
    """
    if not (protocol.lrs and protocol.weight_decays and protocol.norms and train):
        raise UserError("linear sweep: the grid is empty; give at least one learning rate, weight decay and layer")
    if len(labels) < 3:
        raise UserError(f"linear sweep: needs at least 3 training images, not {len(labels)}")
    train, test = (
        {readout: as_features(features, f"linear sweep, {split}, {readout}") for readout, features in given.items()}
        for split, given in (("train", train), ("test", test))
    )
    classes = count_classes(labels, truth)
    held_out, fit = hold_out(len(labels), protocol.seed)
    scale = protocol.batch_size / 256
    settings = [(lr * scale, decay) for lr, decay in itertools.product(protocol.lrs, protocol.weight_decays)]
    device = evaluation_device()
    heads = {
        (readout, norm): _Heads(features.shape[1], classes, settings, norm, protocol.seed, device)
        for readout, features in train.items()
        for norm in protocol.norms
    }
    if fits_on(device, sum(features.nbytes for features in train.values())):
        train = {readout: features.to(device) for readout, features in train.items()}
    _train(heads, train, labels, fit, protocol)
    ranked: list[tuple[tuple[float, float], Head, int]] = []
    for (readout, norm), group in heads.items():
        features = train[readout]
        for index, score in enumerate(group.scores(features[held_out.to(features.device)], labels[held_out])):
            lr, decay = settings[index]
            ranked.append((score, Head(readout, lr / scale, decay, norm, score[0]), index))
    ranked.sort(key=lambda item: item[0], reverse=True)
    _, best, index = ranked[0]
    correct = heads[best.readout, best.norm].is_correct(test[best.readout], truth)[:, index]
    return SweepScore(share_of(correct), best, [head for _, head, _ in ranked], correct)


def _train(
    heads: dict[tuple[str, bool], _Heads],
    train: dict[str, Tensor],
    labels: Tensor,
    fit: Tensor,
    protocol: SweepProtocol,
) -> None:
    device = next(iter(heads.values())).weight.device
    generator = torch.Generator().manual_seed(protocol.seed + 1)
    steps, step = protocol.epochs * -(-len(fit) // protocol.batch_size), 0
    for _ in track(range(protocol.epochs), "linear classifiers", "epoch"):
        for rows in fit[torch.randperm(len(fit), generator=generator)].split(protocol.batch_size):
            factor = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            step += 1
            if len(rows) == 1:  # BatchNorm needs two
                continue
            truth = upload(labels[rows], device)
            on_device = upload(rows, device)
            batches = {
                name: features[on_device if features.is_cuda else rows].to(device) for name, features in train.items()
            }
            for (readout, _), group in heads.items():
                group.update(batches[readout], truth, factor)
