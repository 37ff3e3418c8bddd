"""kNN and the linear probe against golden values, naive loops and scikit-learn."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor, nn

from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate import KnnProtocol, LinearProtocol, knn_accuracy, linear_accuracy
from sslkit.evaluate.features import compared_encoders
from sslkit.evaluate.features.encoder import fingerprint
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.features.pixel_baselines import raw_pixel_side, raw_pixels
from sslkit.evaluate.probes import knn as knn_module
from sslkit.evaluate.probes.knn import predict
from sslkit.evaluate.probes.linear import C_GRID, fit_logistic


def wave(rows: int, scale: float, shift: float) -> Tensor:
    return torch.sin(scale * torch.arange(rows * 16, dtype=torch.float64).view(rows, 16) + shift)


def blobs(rows: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % 5
    return centres[labels] + spread * torch.randn(rows, 12, generator=generator), labels


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_the_size_of_features_changes_no_neighbour(scale: float) -> None:
    """Cosines do not know it; squares in float32 would overflow or vanish."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, 16, generator=generator) for count in (300, 40))
    labels = torch.randint(0, 5, (300,), generator=generator)
    [plain] = predict(queries, bank, labels, 5, [KnnProtocol(5)])
    [scaled] = predict(queries * scale, bank * scale, labels, 5, [KnnProtocol(5)])
    assert torch.equal(plain, scaled)


def test_features_too_large_for_a_papers_rate_are_said() -> None:
    features, labels = torch.randn(64, 8) * 1e20, torch.arange(64) % 2
    with pytest.raises(UserError, match=r"not finite after epoch .*logistic"):
        linear_accuracy(features, labels, features, labels, LinearProtocol.from_name("moco_v1", is_vit=False))


def test_golden_predictions() -> None:
    bank, labels, queries = wave(40, 0.21, 0.5), torch.arange(40) % 4, wave(8, 0.1, 0.3)
    predicted = predict(queries, bank, labels, 4, [KnnProtocol(k=10, temperature=0.07)])[0]
    assert predicted.tolist() == [3, 2, 2, 1, 3, 2, 2, 3]


def test_votes_equal_a_naive_loop() -> None:
    (bank, labels), (queries, truth) = blobs(200, 0), blobs(60, 1)
    right = 0
    for query, label in zip(queries, truth, strict=True):
        similarity = torch.stack([nn.functional.cosine_similarity(query, row, dim=0) for row in bank])
        votes = torch.zeros(5)
        for index in similarity.argsort(descending=True)[:15]:
            votes[labels[index]] += (similarity[index] / 0.1).exp()
        right += int(votes.argmax() == label)
    assert knn_accuracy(bank, labels, queries, truth, KnnProtocol(15, 0.1)) == pytest.approx(right / 60)


def test_votes_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 000 queries of 21 000 classes would be 8.4 GB of votes at once."""
    similarity = torch.rand(4000, 20, generator=torch.Generator().manual_seed(0)).sort(dim=1, descending=True).values
    neighbours = torch.randint(21_000, (4000, 20), generator=torch.Generator().manual_seed(1))
    neighbours[:, 3:7] = neighbours[:, :1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predicted = knn_module.vote(similarity, neighbours, 21_000, KnnProtocol(20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB; at once it were 656 250
    assert torch.equal(predicted, neighbours[:, 0])
    monkeypatch.setattr(knn_module, "MAX_VOTE_ELEMENTS", 1)
    assert torch.equal(knn_module.vote(similarity[:50], neighbours[:50], 21_000, KnnProtocol(20)), predicted[:50])


def test_one_neighbour_on_the_bank_itself_is_perfect_and_small_temperatures_are_finite() -> None:
    bank, labels = blobs(200, 0)
    assert knn_accuracy(bank, labels, bank, labels, KnnProtocol(k=1)) == 1.0
    assert knn_accuracy(bank, labels, bank, labels, KnnProtocol(k=20, temperature=1e-3)) == 1.0


def test_several_protocols_at_once_are_each_alone() -> None:
    (bank, labels), (queries, _) = blobs(300, 0), blobs(60, 1)
    protocols = [KnnProtocol(5), KnnProtocol(200, 0.5), KnnProtocol(20, centre=True), *KnnProtocol.from_name("dino")]
    together = predict(queries, bank, labels, 5, protocols)
    for protocol, predicted in zip(protocols, together, strict=True):
        assert torch.equal(predicted, predict(queries, bank, labels, 5, [protocol])[0])
    assert [protocol.k for protocol in KnnProtocol.from_name("instdisc")] == [200]
    with pytest.raises(UserError, match="did you mean 'dino'"):
        KnnProtocol.from_name("dinov")


@pytest.mark.parametrize("k", [0, 201, -3])
def test_impossible_numbers_of_neighbours(k: int) -> None:
    bank, labels = blobs(200, 0)
    with pytest.raises(UserError, match=f"k = {k}, but the bank has 200 images"):
        knn_accuracy(bank, labels, bank, labels, KnnProtocol(k=k))


def test_logistic_regression_is_sklearns() -> None:
    features, labels = blobs(300, 0)
    ours = fit_logistic(features.double(), labels, 5, c=0.1)
    theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=1000).fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(ours.weight.detach().numpy(), theirs.coef_, atol=2e-3)


def test_the_penalty_is_the_one_whose_held_out_log_loss_is_lowest() -> None:
    (train, labels), (test, truth) = blobs(400, 0, spread=2.5), blobs(100, 1, spread=2.5)
    chosen = float(linear_accuracy(train, labels, test, truth).chosen.removeprefix("C = "))
    units = ((train - train.mean(0)) / train.std(0)).double().numpy()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).numpy()
    held_out, rest = order[:40], order[40:]
    losses = {}
    for c in C_GRID:
        model = LogisticRegression(C=c, tol=1e-8, max_iter=2000).fit(units[rest], labels[rest].numpy())
        losses[c] = log_loss(labels[held_out].numpy(), model.predict_proba(units[held_out]))
    assert chosen == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("name", ["logistic", "moco_v1", "moco_v3", "simclr"])
def test_protocols_learn_what_can_be_learned(name: str) -> None:
    (train, labels), (test, truth) = blobs(400, 0, spread=0.3), blobs(100, 1, spread=0.3)
    protocol = LinearProtocol.from_name(name, is_vit=True)
    assert linear_accuracy(train, labels, test, truth, protocol).accuracy > 0.95


def test_protocols_have_the_papers_numbers() -> None:
    v1 = LinearProtocol.from_name("moco_v1", is_vit=False)
    assert (v1.lr, v1.epochs, v1.batch_size, v1.decay) == (30.0, 100, 256, "steps")
    assert LinearProtocol.from_name("moco_v3", is_vit=False).lr == pytest.approx(0.4)
    assert LinearProtocol.from_name("moco_v3", is_vit=True).lr == pytest.approx(12.0)
    simclr, dino = (LinearProtocol.from_name(name, is_vit=True) for name in ("simclr", "dino"))
    assert (simclr.lr, simclr.weight_decay, simclr.epochs, simclr.nesterov) == (pytest.approx(1.6), 1e-6, 90, True)
    assert (simclr.batch_size, simclr.init_std, simclr.decay) == (4096, 0.0, "cosine")
    assert (dino.lr, dino.weight_decay, dino.epochs, dino.decay) == (pytest.approx(0.004), 0.0, 100, "cosine")
    with pytest.raises(UserError, match="did you mean 'moco_v1'"):
        LinearProtocol.from_name("mocov1", is_vit=False)


def test_extraction_leaves_the_encoder_as_it_was() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test")).subset(np.arange(20))
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    encoder.train()
    before = fingerprint(encoder)

    def transform(picture: object) -> Tensor:
        return torch.from_numpy(np.asarray(picture)).permute(2, 0, 1) / 255.0

    features = extract_features(encoder, source, transform, device=torch.device("cpu"), batch_size=7)
    assert features.shape == (20, 4 * 26 * 26)
    assert fingerprint(encoder) == before
    assert encoder.training
    torch.testing.assert_close(features[:7], encoder.eval()(torch.stack([transform(source.read(i)) for i in range(7)])))


@pytest.mark.full
def test_raw_pixels_reach_their_known_score() -> None:
    """Fashion-MNIST, 10 000 / 2 000, mean subtracted, cosine, k = 20: 83 % by the literature's common protocol."""
    train = open_source(DataConfig(path="builtin:fashion_mnist"))
    test = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    classes = {name: number for number, name in enumerate(train.class_names())}
    labels, truth = (torch.tensor([classes[name] for name in s.labels()]) for s in (train, test))
    side = raw_pixel_side(train)
    score = knn_accuracy(
        raw_pixels(train, side), labels, raw_pixels(test, side), truth, KnnProtocol(20, 0.07, centre=True)
    )
    assert 0.825 < score < 0.84


@pytest.mark.parametrize("words", [["--k", "20,9"], ["--k", "0"], ["--protocol", "instdisc"]])
def test_a_k_that_the_bank_has_not_is_refused_before_features(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten images, of which two are held out, so that the bank has eight."""
    for number in range(10):
        (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 25 * number, np.uint8)).save(tmp_path / f"class{number % 2}/{number}.png")
    monkeypatch.setattr(compared_encoders, "load_encoder", lambda name: pytest.fail("the encoder was loaded"))
    with pytest.raises(SystemExit) as ended:
        main(["eval", "knn", "resnet18", "--data", str(tmp_path), *words])
    assert ended.value.code == 2
    assert "but the bank has 8 images; use --k 1 to 8" in capsys.readouterr().err
