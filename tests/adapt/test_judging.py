"""What the verdict rests on: no image answers for its copy, and no choice is judged by the images that made it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from sslkit.adapt.candidates import Candidate, best, compare_encoders, fairly_judged
from sslkit.adapt.judged_images import JudgedImages, open_judged
from sslkit.adapt.label_free_verdict import neighbour_correlation, readable
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.whitening import whiten
from sslkit.evaluate.probes.knn import KnnProtocol, predict, predict_by_others


def write(folder: Path, count: int, seed: int, copies: int = 0) -> Path:
    """Random images of two classes whose labels mean nothing; some twice, encoded differently."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        (folder / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(folder / f"class{index % 2}" / f"{index}.png")
        if index < copies:
            image.save(folder / f"class{index % 2}" / f"{index}.bmp")
    return folder


def pixels(judged: JudgedImages) -> list[torch.Tensor]:
    return [
        torch.stack([torch.from_numpy(source.read(row).astype(np.float32)).flatten() for row in range(len(source))])
        for source in judged.sources
    ]


def test_copies_do_not_answer_for_each_other(tmp_path: Path) -> None:
    judged = open_judged(DataConfig(path=str(write(tmp_path, 60, 0, copies=60))), "--labelled")
    assert judged.count == 120
    assert judged.copied == 120
    features = pixels(judged)
    naive = predict(features[0], features[0], judged.labels, 2, [KnnProtocol(1)])[0]
    assert (naive == judged.labels).all()
    for correct in (judged.knn_correct(features), judged.linear_correct(features)):
        assert correct.mean() < 0.7
        assert np.array_equal(correct[judged.copies.argsort(stable=True)][::2].shape, (60,))
    for fold in judged.folds.unique():
        assert not set(judged.copies[judged.folds == fold].tolist()) & set(judged.copies[judged.folds != fold].tolist())


def test_a_test_split_is_used_and_its_copies_are_not(tmp_path: Path) -> None:
    write(tmp_path / "train", 60, 1)
    write(tmp_path / "test", 40, 1)  # images that are in train too
    judged = open_judged(DataConfig(path=str(tmp_path)), "--labelled")
    assert judged.test is not None
    assert judged.copied == 40
    assert judged.knn_correct(pixels(judged)).mean() < 0.8


def test_a_test_split_of_the_training_images_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path / "train", 40, 1)
    write(tmp_path / "test", 40, 1)
    with pytest.raises(UserError, match=r"--labelled: .*the training images are those of the test split"):
        open_judged(DataConfig(path=str(tmp_path)), "--labelled")


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 40, 1)
    for name in ("class0/0.png", "class1/39.png"):
        (tmp_path / name).write_bytes(b"no image")
    source = open_source(DataConfig(path=str(tmp_path)))
    judged = open_judged(DataConfig(path=str(tmp_path)), "--labelled")
    assert judged.count == len(judged.digests) == len(judged.folds) == 38
    assert [judged.train.read(row).shape for row in range(38)] == [(8, 8, 3)] * 38
    assert judged.labels.tolist() == [0] * 19 + [1] * 19
    assert abs(neighbour_correlation(source)) < 0.2
    assert len(readable(source)) == 38


def test_neighbours_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 6, generator=generator)
    labels = torch.randint(4, (80,), generator=generator)
    numbers = torch.arange(80)
    numbers[1::4] = numbers[::4]  # every fourth image has a copy
    found = predict_by_others(rows, rows, labels, 4, KnnProtocol(5, 0.07, centre=True), (numbers, numbers))
    unit = rows - rows.mean(dim=0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    for row in range(80):
        others = numbers != numbers[row]
        learner = KNeighborsClassifier(5, weights=lambda d: np.exp(-(d**2) / 2 / 0.07), algorithm="brute")
        learner.fit(unit[others], labels[others])
        assert learner.predict(unit[row : row + 1])[0] == found[row]


def candidate(name: str, correct: np.ndarray, features: torch.Tensor) -> Candidate:  # type: ignore[type-arg]
    return Candidate(name, 1, 32, False, correct, correct, [features])


def test_the_best_of_many_equals_is_no_better(tmp_path: Path) -> None:
    """Forty encoders that guess: the best looks far better than one, but is not called so."""
    judged = open_judged(DataConfig(path=str(write(tmp_path, 200, 3))), "--labelled")
    generator = np.random.default_rng(0)
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    guesses = [candidate(str(index), generator.random(200) < 0.5, rows) for index in range(40)]
    start = candidate("start", generator.random(200) < 0.5, rows)
    assert best(guesses).accuracy > 0.56
    assert abs(fairly_judged(guesses, judged).mean() - 0.5) < 0.06
    knn, _ = compare_encoders(judged, [start], guesses)
    assert not knn.difference.is_better
    better = [*guesses, candidate("better", generator.random(200) < 0.9, rows)]
    assert compare_encoders(judged, [start], better)[0].difference.is_better


def test_whitening_gives_equal_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3.0
    plain, again = whiten(rows, rows[:7], shrinkage=0.0)
    assert torch.allclose(plain.T @ plain / 300, torch.eye(5), atol=1e-4)
    assert torch.allclose(plain[:7], again, atol=1e-5)
    variances = np.linalg.eigvalsh(np.cov(rows.numpy().T, bias=True))[::-1]
    shrunk = whiten(rows)[0].square().mean(dim=0).numpy()
    np.testing.assert_allclose(shrunk, variances / (variances + variances.mean()), rtol=1e-4)
