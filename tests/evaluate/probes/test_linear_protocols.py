"""The papers' linear protocols step by step: which rate, how many images, which classifier is scored."""

import math

import pytest
import torch
from torch import Tensor

from sslkit.evaluate import LinearProtocol, linear_accuracy
from sslkit.evaluate.probes import linear
from sslkit.evaluate.protocol import protocol_hash

PAPERS = ("moco_v1", "moco_v3", "simclr", "byol", "swav", "dino")
IMAGES, EPOCHS, BATCH = 70, 4, 16

# What each step's rate must be, as a share of the peak: by step t of T (64 whole-batch images an epoch), or by epoch.
BY_STEP = [0.5 * (1 + math.cos(math.pi * t / 16)) for t in range(16)]
BY_EPOCH = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(5)]
FALLING = [share for share in (1.0, 1.0, 1.0, 0.1) for _ in range(5)]  # at 60 % of 4 epochs: from the fourth
RATES = {
    "moco_v1": FALLING,
    "moco_v3": BY_EPOCH,
    "simclr": BY_STEP,
    "byol": BY_STEP,
    "swav": BY_EPOCH,
    "dino": BY_EPOCH,
}


def short(name: str) -> LinearProtocol:
    full = LinearProtocol.from_name(name, is_vit=False)
    return LinearProtocol(**{**vars(full), "epochs": EPOCHS, "batch_size": BATCH})


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(IMAGES, 5)
    return features, (features[:, 0] > 0).long()


@pytest.mark.parametrize("name", PAPERS)
def test_rates_and_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, sizes = [], []

    class Watched(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        return torch.nn.functional.cross_entropy(logits, labels)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    monkeypatch.setattr("sslkit.evaluate.probes.linear.cross_entropy", cross_entropy)
    features, labels = data()
    linear_accuracy(features, labels, features, labels, short(name))
    assert rates == pytest.approx([short(name).lr * share for share in RATES[name]], rel=1e-12, abs=1e-15)
    assert sizes == ([16] * 16 if name in ("simclr", "byol") else [16, 16, 16, 16, 6] * 4)


@pytest.mark.parametrize("name", PAPERS)
def test_which_classifier_is_scored(name: str) -> None:
    """In the last epoch every image has another's label: the best epoch is an earlier one."""
    features, labels = data()
    protocol = LinearProtocol(**{**vars(short(name)), "decay": "none", "lr": 3.0, "epochs": 6})

    def of_epoch(epoch: int) -> Tensor:
        return -1000 * features if epoch == 5 else features

    score = linear_accuracy(of_epoch, labels, features, labels, protocol)
    if name in ("simclr", "byol"):
        assert score.accuracy < 0.5
        assert score.chosen == "last of 6 epochs, as in the paper"
        assert protocol.selection == "none, the last epoch"
    else:
        assert score.accuracy > 0.9
        assert score.chosen.startswith("best of 6 epochs: ")
        assert protocol.selection == "the best epoch, by the test images"


def test_byol_and_swav_have_the_codes_numbers() -> None:
    byol, swav = (LinearProtocol.from_name(name, is_vit=False) for name in ("byol", "swav"))
    assert (byol.epochs, byol.lr, byol.batch_size, byol.nesterov) == (80, pytest.approx(0.2 * 16), 4096, True)
    assert (byol.weight_decay, byol.decay, byol.init_std) == (0.0, "cosine", -1.0)
    assert (swav.epochs, swav.lr, swav.batch_size, swav.nesterov) == (100, 0.3, 256, False)
    assert (swav.weight_decay, swav.decay, swav.init_std) == (1e-6, "cosine", 0.01)


def test_the_first_weights_of_byols_classifier() -> None:
    """Haiku's Linear: a normal of 1 / sqrt(fan in), drawn again beyond two deviations: 0.8796 of its spread."""
    protocol = LinearProtocol.from_name("byol", is_vit=False)
    classifier = linear._initial_classifier(400, 300, protocol, torch.Generator().manual_seed(0))
    assert classifier.weight.abs().max().item() <= 2 / 20
    assert classifier.weight.std().item() == pytest.approx(0.87962566 / 20, rel=0.01)
    assert not classifier.bias.any()


def test_fewer_images_than_a_batch_are_one() -> None:
    features, labels = data()
    protocol = LinearProtocol(**{**vars(short("simclr")), "batch_size": 4096, "epochs": 50})
    assert linear_accuracy(features, labels, features, labels, protocol).accuracy > 0.8


def test_the_other_protocols_keep_their_hash() -> None:
    """Scores that lie in results.jsonl stay comparable; SimCLR's probe is another one now, and has another hash."""
    before = ("name", "epochs", "batch_size", "lr", "decay", "seed", "weight_decay", "nesterov", "init_std")
    for name in ("logistic", *PAPERS):
        named = LinearProtocol.from_name(name, is_vit=False)
        old = protocol_hash({key: getattr(named, key) for key in before})
        assert (protocol_hash(named.settings()) == old) == (name not in ("simclr", "byol"))
