"""Linear classification of frozen features, by regularised logistic regression or by the papers' protocols."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslkit.errors import UserError
from sslkit.evaluate.features.devices import evaluation_device, fits_on, move_if_it_fits
from sslkit.evaluate.input_checks import as_features, check_seed, choose_protocol
from sslkit.evaluate.probes.knn import count_classes, is_correct, share_of
from sslkit.progress import track

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT = 0.1
COPIES = 3  # of the features that logistic regression needs room for
# Part of the protocol hash.
SELECTED_ON_HELD_OUT = "by a tenth of the training images, held out by the seed"

EpochFeatures = Callable[[int], Tensor]


@dataclass(frozen=True)
class LinearProtocol:
    """How the classifier is trained.

    ``logistic`` standardises the features and minimises the cross-entropy with an L2 penalty 1 / (2 C n) by L-BFGS on
    the full batch. C is chosen from `C_GRID` by the loss on a held-out tenth of the training set, never on the test
    set. The loss is used because accuracies on so few images are noisy.

    The other protocols are the papers': SGD with momentum 0.9 on raw features.

    - ``moco_v1``, ``moco_v3``, ``swav`` and ``dino`` set the learning rate per epoch, use every image in every epoch
      and report the best epoch on the test set, as the official code does.
    - ``simclr`` and ``byol`` set the learning rate per step, drop the incomplete last batch and report the last epoch.
      The official loaders let the last batch continue into the next epoch instead. BYOL's paper chooses among five
      learning rates on held-out images; its code uses one, and so does ``byol``.

    Attributes:
        epochs: SGD only (moco_v1, swav and dino 100, moco_v3 and simclr 90, byol 80).
        batch_size: SGD only (moco_v1 and swav 256, moco_v3 and dino 1024, simclr and byol 4096).
        lr: Peak learning rate (moco_v1 30, swav 0.3; scaled with batch / 256: moco_v3 0.1 for ResNets and 3 for ViTs,
            simclr 0.1, byol 0.2, dino 0.001).
        decay: ``steps``, times 0.1 at 60 % and 80 %, or ``cosine``.
        seed: Of held-out images, initialisation and order.
        weight_decay: L2 penalty (simclr and swav 1e-6, others 0).
        nesterov: Whether to use Nesterov momentum (simclr, byol).
        init_std: Standard deviation of the initial weights; simclr 0, others 0.01. -1 truncates a standard deviation
            of 1 / sqrt(D) at two deviations, as Haiku's Linear (byol).
        per: Whether the learning rate changes every ``step`` or every ``epoch``.
        drop_last: Whether to drop the incomplete last batch. With fewer images than a batch, all are one batch.
        scored: Whether to report the ``best`` epoch on the test set or the ``last`` one.
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
        """Which images select a hyperparameter or an epoch; part of the protocol hash."""
        if self.name == "logistic":
            return SELECTED_ON_HELD_OUT
        return "the best epoch, by the test images" if self.scored == "best" else "none, the last epoch"

    def settings(self) -> dict[str, Any]:
        """The settings for the protocol hash. Newer ones are left out at their defaults, so that hashes stay equal."""
        newer = {"per": "epoch", "drop_last": False, "scored": "best"}
        return {name: value for name, value in vars(self).items() if name not in newer or value != newer[name]}

    def __post_init__(self) -> None:
        check_seed(self.seed, "linear")

    @staticmethod
    def from_name(name: str, *, is_vit: bool, seed: int = 0) -> "LinearProtocol":
        """The protocol of this name, with the paper's numbers for a ViT or a ResNet."""
        last: dict[str, Any] = {"nesterov": True, "per": "step", "drop_last": True, "scored": "last"}
        moco_v3_lr = 3.0 if is_vit else 0.1
        protocols = {
            "logistic": LinearProtocol("logistic", seed=seed),
            "moco_v1": LinearProtocol("moco_v1", 100, 256, 30.0, "steps", seed),
            "moco_v3": LinearProtocol("moco_v3", 90, 1024, moco_v3_lr * 1024 / 256, "cosine", seed),
            "simclr": LinearProtocol("simclr", 90, 4096, 0.1 * 4096 / 256, "cosine", seed, 1e-6, init_std=0.0, **last),
            "byol": LinearProtocol("byol", 80, 4096, 0.2 * 4096 / 256, "cosine", seed, init_std=-1.0, **last),
            "swav": LinearProtocol("swav", 100, 256, 0.3, "cosine", seed, 1e-6),
            "dino": LinearProtocol("dino", 100, 1024, 0.001 * 1024 / 256, "cosine", seed),
        }
        return choose_protocol("linear", name, protocols)


@dataclass(frozen=True)
class LinearScore:
    """Accuracy on the test set, and what was selected: C of ``logistic``, the epoch of SGD."""

    accuracy: float
    chosen: str
    correct: Tensor = field(compare=False, repr=False)  # (Q,) bool: which test images are right


def linear_accuracy(
    train: Tensor | EpochFeatures, labels: Tensor, test: Tensor, truth: Tensor, protocol: LinearProtocol | None = None
) -> LinearScore:
    """Train a linear classifier on frozen features (N, D) and test it on (Q, D), on a GPU if there is one, in float32.

    For the SGD protocols, ``train`` may be a function from the epoch to the features of that epoch's augmented images.
    The default protocol is ``logistic``. Raises `UserError` if features are not finite, or there are fewer than two
    training images.
    """
    protocol, device = protocol or LinearProtocol(), evaluation_device()
    if len(labels) < 2:
        raise UserError(f"linear: needs at least 2 training images, not {len(labels)}")
    test = as_features(test, "linear, test")
    if not callable(train):
        train = as_features(train, "linear, train")
        if protocol.name == "logistic":
            place = device if fits_on(device, COPIES * (train.nbytes + test.nbytes)) else torch.device("cpu")
            return _logistic(train.to(place), labels.to(place), test.to(place), truth.to(place), protocol)
    return _sgd(train, labels, test, truth, protocol, device)


def hold_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``count`` positions at random into a tenth, at least one, for selection and the rest for training."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(round(count * HELD_OUT), 1)
    return order[:held_out], order[held_out:]


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, c: float, start: nn.Linear | None = None
) -> nn.Linear:
    """Fit multinomial logistic regression, mean cross-entropy + ||W||^2 / (2 C n), to convergence by L-BFGS.

    The loss is convex, so ``start``, the solution for another C, only saves iterations.
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


def _logistic(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, protocol: LinearProtocol) -> LinearScore:
    num_classes = count_classes(labels, truth)
    mean, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train, test = (train - mean) / scale, (test - mean) / scale
    held_out, fit = (rows.to(train.device) for rows in hold_out(len(train), protocol.seed))
    best_c, best_loss = 0.0, math.inf
    best: nn.Linear | None = None
    for c in track(C_GRID, "logistic regression, penalties", "fit"):
        classifier = fit_logistic(train[fit], labels[fit], num_classes, c, best)
        with torch.no_grad():
            loss = float(cross_entropy(classifier(train[held_out]), labels[held_out]))
        if loss >= best_loss:
            break  # weaker penalties only overfit more
        best_c, best_loss, best = c, loss, classifier
    classifier = fit_logistic(train, labels, num_classes, best_c, best)
    return _score(_is_correct(classifier, test, truth), f"C = {best_c:g}")


def _sgd(
    train: Tensor | EpochFeatures,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    protocol: LinearProtocol,
    device: torch.device,
) -> LinearScore:
    """Train on the device. Features that it has no room for stay on the CPU, and batches are moved."""
    generator = torch.Generator().manual_seed(protocol.seed)
    classifier = _initial_classifier(test.shape[1], count_classes(labels, truth), protocol, generator).to(device)
    test = test.to(device)
    train = train if callable(train) else move_if_it_fits(train, device)
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
    best, best_epoch, correct = torch.zeros(len(truth), dtype=torch.bool), 0, torch.zeros(0, dtype=torch.bool)
    for epoch in track(range(protocol.epochs), "linear classifier", "epoch"):
        features = as_features(train(epoch), f"linear, epoch {epoch + 1}") if callable(train) else train
        if callable(train):
            features = move_if_it_fits(features, device)
        labels = labels.to(features.device)
        order = torch.randperm(len(features), generator=generator)[:images].to(features.device)
        for step, batch in enumerate(order.split(batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr * _decay(protocol, epoch + (step / steps if protocol.per == "step" else 0.0))
            loss = cross_entropy(classifier(features[batch].to(device)), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not torch.stack([param.isfinite().all() for param in classifier.parameters()]).all():
            raise UserError(
                f"linear, {protocol.name}: the classifier's weights are not finite after epoch {epoch + 1}; features "
                f"up to {float(test.abs().max()):.2g} are too large for a learning rate of {protocol.lr:g}; use "
                "--protocol logistic"
            )
        correct = _is_correct(classifier, test, truth)
        if correct.sum() > best.sum():
            best, best_epoch = correct, epoch + 1
    if protocol.scored == "last":
        return _score(correct, f"last of {protocol.epochs} epochs, as in the paper")
    return _score(best, f"best of {protocol.epochs} epochs: {best_epoch}, as in the paper")


def _score(correct: Tensor, chosen: str) -> LinearScore:
    return LinearScore(share_of(correct), chosen, correct)


@torch.no_grad()
def _initial_classifier(
    width: int, num_classes: int, protocol: LinearProtocol, generator: torch.Generator
) -> nn.Linear:
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
def _is_correct(classifier: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    return is_correct(classifier(features).argmax(dim=1), labels)
