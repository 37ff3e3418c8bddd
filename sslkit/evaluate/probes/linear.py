"""Linear classification of frozen features, by the papers' protocols or by regularised logistic regression."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslkit.errors import UserError, near_miss
from sslkit.evaluate.input_checks import as_features, check_seed

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT = 0.1
HELD_OUT_CHOOSES = "by a tenth of the training images, held out by the seed"


@dataclass(frozen=True)
class LinearProtocol:
    """How the classifier is trained.

    ``logistic`` standardises the features and minimises the full-batch loss with an L2 penalty 1 / (2 C n) by L-BFGS;
    C is chosen from `C_GRID` by the log loss of a seeded tenth of the training set, never on the test set: accuracies
    on so few images differ by chance alone. The others are the papers': SGD with momentum 0.9 on raw features.

    ``moco_v1``, ``moco_v3``, ``swav`` and ``dino`` set the rate per epoch, use every image in every epoch and report
    the best epoch on the test set, as their code does. ``simclr`` and ``byol`` set it per step, drop what is left of an
    epoch after its last whole batch, and score the final classifier. (Their loaders let a batch run over the end of an
    epoch instead of dropping the rest.) BYOL's paper chooses among five rates on held-out images; its code has one, and
    so has ``byol``.

    Attributes:
        name: Which protocol.
        epochs: Passes of the SGD protocols (moco_v1, swav and dino 100, moco_v3 and simclr 90, byol 80).
        batch_size: Of the SGD protocols (moco_v1 and swav 256, moco_v3 and dino 1024, simclr and byol 4096).
        lr: Peak rate (moco_v1 30, swav 0.3; times batch / 256: moco_v3 0.1 for ResNet, 3 for ViT, simclr 0.1, byol 0.2,
            dino 0.001).
        decay: ``steps`` times 0.1 at 60 % and 80 %, or ``cosine``.
        seed: Of held-out draw, initialisation and order.
        weight_decay: L2 penalty (simclr and swav 1e-6, else none).
        nesterov: Whether the momentum looks ahead (simclr, byol).
        init_std: Of the first weights: 0.01, but simclr begins at zero. -1: cut at two deviations of 1 / sqrt(D), as
            Haiku's Linear (byol).
        per: Whether the rate moves with every ``step`` or ``epoch``.
        drop_last: Whether what is left of an epoch after its last whole batch is left out. Fewer images than a batch
            are one batch.
        scored: Whether the ``best`` epoch on the test set is reported or the ``last``.
    """

    name: Literal["logistic", "moco_v1", "moco_v3", "simclr", "byol", "swav", "dino"] = "logistic"
    epochs: int = 0
    batch_size: int = 0
    lr: float = 0.0
    decay: Literal["steps", "cosine", "none"] = "none"
    seed: int = 0
    weight_decay: float = 0.0
    nesterov: bool = False
    init_std: float = 0.01
    per: Literal["step", "epoch"] = "epoch"
    drop_last: bool = False
    scored: Literal["best", "last"] = "best"

    @property
    def selection(self) -> str:
        """On which images something is chosen."""
        if self.name == "logistic":
            return HELD_OUT_CHOOSES
        return "the best epoch, by the test images" if self.scored == "best" else "none, the last epoch"

    def settings(self) -> dict[str, Any]:
        """What a score's protocol says of it; keys that came later are named only where they differ from before."""
        later = {"per": "epoch", "drop_last": False, "scored": "best"}
        return {name: value for name, value in vars(self).items() if name not in later or value != later[name]}

    def __post_init__(self) -> None:
        check_seed(self.seed, "linear")

    @staticmethod
    def named(name: str, *, is_vit: bool, seed: int = 0) -> "LinearProtocol":
        """The protocol of this name with the paper's numbers for a ViT or a ResNet."""
        if name == "moco_v1":
            return LinearProtocol("moco_v1", 100, 256, 30.0, "steps", seed)
        if name == "moco_v3":
            return LinearProtocol("moco_v3", 90, 1024, (3.0 if is_vit else 0.1) * 1024 / 256, "cosine", seed)
        final: dict[str, Any] = {"nesterov": True, "per": "step", "drop_last": True, "scored": "last"}
        if name == "simclr":
            return LinearProtocol("simclr", 90, 4096, 0.1 * 4096 / 256, "cosine", seed, 1e-6, init_std=0.0, **final)
        if name == "byol":
            return LinearProtocol("byol", 80, 4096, 0.2 * 4096 / 256, "cosine", seed, init_std=-1.0, **final)
        if name == "swav":
            return LinearProtocol("swav", 100, 256, 0.3, "cosine", seed, 1e-6)
        if name == "dino":
            return LinearProtocol("dino", 100, 1024, 0.001 * 1024 / 256, "cosine", seed)
        if name != "logistic":
            known = ("logistic", "moco_v1", "moco_v3", "simclr", "byol", "swav", "dino")
            raise UserError(f"linear: unknown protocol {name!r}{near_miss(name, known)}; there are {', '.join(known)}")
        return LinearProtocol("logistic", seed=seed)


@dataclass(frozen=True)
class LinearScore:
    """Accuracy on the test set, and what was chosen on the way (C of ``logistic``, best epoch of SGD)."""

    accuracy: float
    chosen: str


EpochFeatures = Callable[[int], Tensor]


def linear_accuracy(
    train: Tensor | EpochFeatures,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    protocol: LinearProtocol | None = None,
) -> LinearScore:
    """Train a linear classifier on frozen features and score it.

    Args:
        train: (N, D) features; or, for the SGD protocols, a function from the epoch to (N, D) features of that
            epoch's augmented images.
        labels: (N,) int64.
        test: (Q, D) features.
        truth: (Q,) int64.
        protocol: Defaults to ``logistic``.

    Features may be of any precision; everything is computed in float32.

    Raises:
        UserError: Features are not finite, or there are fewer than two training images.
    """
    protocol = protocol or LinearProtocol()
    if len(labels) < 2:
        raise UserError(f"linear: a classifier needs at least two training images, not {len(labels)}")
    test = as_features(test, "linear, test")
    num_classes = int(max(labels.max(), truth.max())) + 1
    epoch_features = _checked(train)
    if protocol.name == "logistic":
        return _logistic(epoch_features(0), labels, test, truth, num_classes, protocol)
    return _sgd(epoch_features, labels, test, truth, num_classes, protocol)


def _checked(train: Tensor | EpochFeatures) -> EpochFeatures:
    if callable(train):
        return lambda epoch: as_features(train(epoch), f"linear, epoch {epoch + 1}")
    features = as_features(train, "linear, train")
    return lambda _epoch: features


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, c: float, start: nn.Linear | None = None
) -> nn.Linear:
    """Multinomial logistic regression, mean cross-entropy + ||W||^2 / (2 C n), to convergence by L-BFGS.

    The loss is convex: ``start``, the solution for another C, only shortens the way.
    """
    with torch.random.fork_rng(devices=[]):
        classifier = nn.Linear(features.shape[1], num_classes).to(features)
    with torch.no_grad():
        classifier.weight.copy_(start.weight if start else torch.zeros_like(classifier.weight))
        classifier.bias.copy_(start.bias if start else torch.zeros_like(classifier.bias))
    penalty = 1.0 / (2.0 * c * len(features))
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(classifier(features), labels) + penalty * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


def _logistic(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, num_classes: int, protocol: LinearProtocol
) -> LinearScore:
    mean, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train, test = (train - mean) / scale, (test - mean) / scale
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(protocol.seed))
    held_out = max(round(len(train) * HELD_OUT), 1)
    choose, fit = order[:held_out], order[held_out:]

    best, lowest = 0.0, math.inf
    chosen: nn.Linear | None = None
    for c in C_GRID:
        classifier = fit_logistic(train[fit], labels[fit], num_classes, c, chosen)
        with torch.no_grad():
            loss = float(cross_entropy(classifier(train[choose]), labels[choose]))
        if loss >= lowest:
            break  # weaker penalties only overfit more
        best, lowest, chosen = c, loss, classifier
    classifier = fit_logistic(train, labels, num_classes, best, chosen)
    return LinearScore(_accuracy(classifier, test, truth), f"C = {best:g}")


def _sgd(
    epoch_features: EpochFeatures,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    num_classes: int,
    protocol: LinearProtocol,
) -> LinearScore:
    generator = torch.Generator().manual_seed(protocol.seed)
    classifier = _first_classifier(test.shape[1], num_classes, protocol, generator)
    batch_size = min(protocol.batch_size, len(labels))
    images = len(labels) - (len(labels) % batch_size if protocol.drop_last else 0)
    steps = -(-images // batch_size)
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=protocol.lr,
        momentum=0.9,
        weight_decay=protocol.weight_decay,
        nesterov=protocol.nesterov,
    )
    best, best_epoch, accuracy = 0.0, 0, 0.0
    for epoch in range(protocol.epochs):
        features = epoch_features(epoch)
        for step, batch in enumerate(torch.randperm(len(features), generator=generator)[:images].split(batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr * _decay(protocol, epoch + (step / steps if protocol.per == "step" else 0.0))
            loss = cross_entropy(classifier(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not all(bool(param.isfinite().all()) for param in classifier.parameters()):
            raise UserError(
                f"linear, {protocol.name}: the classifier is not finite after epoch {epoch + 1}; features as large as "
                f"{float(test.abs().max()):.2g} are too large for its rate of {protocol.lr:g}: take --protocol logistic"
            )
        accuracy = _accuracy(classifier, test, truth)
        if accuracy > best:
            best, best_epoch = accuracy, epoch + 1
    if protocol.scored == "last":
        return LinearScore(accuracy, f"after the last of {protocol.epochs} epochs, as the paper reports")
    return LinearScore(best, f"best of {protocol.epochs} epochs, at {best_epoch}, as the paper reports")


@torch.no_grad()
def _first_classifier(width: int, num_classes: int, protocol: LinearProtocol, generator: torch.Generator) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        classifier = nn.Linear(width, num_classes)
    if protocol.init_std < 0.0:
        std = width**-0.5
        nn.init.trunc_normal_(classifier.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        classifier.weight.normal_(0.0, protocol.init_std, generator=generator)
    classifier.bias.zero_()
    return classifier


def _decay(protocol: LinearProtocol, epoch: float) -> float:
    if protocol.decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * epoch / protocol.epochs))
    return float(0.1 ** sum(epoch >= share * protocol.epochs for share in (0.6, 0.8)))


@torch.no_grad()
def _accuracy(classifier: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return float((classifier(features).argmax(dim=1) == labels).float().mean())
