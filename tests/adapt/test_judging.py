"""What the verdict rests on: copies count once, and no choice is judged by the images that made it."""

from dataclasses import replace
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
from sslkit.evaluate.probes.knn import KnnProtocol, predict_by_others


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


def test_copies_count_once(tmp_path: Path) -> None:
    judged = open_judged(DataConfig(path=str(write(tmp_path, 60, 0, copies=60))), "--labelled")
    assert judged.count == len(judged.train) == len(set(judged.digests)) == 60
    assert judged.copied == 60
    assert torch.bincount(judged.folds).tolist() == [12] * 5
    correct, choosing = judged.knn(pixels(judged))  # a copy would always find the other
    assert correct.shape == (60,)
    assert correct.mean() < 0.7
    assert choosing.max() < 0.75
    assert judged.linear_correct([pixels(judged)] * 5).mean() < 0.7
    [knn, _] = compare_encoders(judged, [guess(judged, 0)], [guess(judged, 1)])
    assert knn.difference.images == 60


def test_equal_images_are_refused(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"class{index % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (90, 10, 0)).save(tmp_path / f"class{index % 2}" / f"{index}.png")
    with pytest.raises(UserError) as caught:
        open_judged(DataConfig(path=str(tmp_path)), "--labelled")
    [message] = caught.value.messages
    assert message.startswith("--labelled: ")
    assert "has 1 labelled image (39 left out as copies) of 1 class; a verdict needs 10 different images and" in message


def test_a_test_split_is_used_and_its_copies_are_not(tmp_path: Path) -> None:
    write(tmp_path / "train", 60, 1)
    write(tmp_path / "test", 40, 1)  # images that are in train too
    judged = open_judged(DataConfig(path=str(tmp_path)), "--labelled")
    assert judged.test is not None
    assert judged.copied == 40
    assert len(judged.train) == len(judged.labels) == 20
    assert judged.count == 40
    correct, choosing = judged.knn(pixels(judged))
    assert correct.mean() < 0.8
    assert choosing.shape == (1,)


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


def guess(judged: JudgedImages, seed: int, signal: float = 0.0) -> Candidate:
    """A candidate of random features, which tell the classes by ``signal``."""
    rows = torch.randn(judged.count, 4, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] += signal * judged.labels
    correct, choosing = judged.knn([rows])
    return Candidate(str(seed), 1, 32, False, correct, choosing, float(correct.mean()), [rows])


def test_no_part_chooses_or_classifies_for_itself(tmp_path: Path) -> None:
    """Other features and labels of a part change neither what is chosen for it, nor how one of its images fares."""
    judged = open_judged(DataConfig(path=str(write(tmp_path, 60, 3))), "--labelled")
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    correct, choosing = judged.knn([rows])
    for part, (others, tested) in enumerate(judged.parts):
        assert sorted([*others.tolist(), *tested.tolist()]) == list(range(60))
        kept, *changed = tested.tolist()
        moved, labels = rows.clone(), judged.labels.clone()
        moved[changed] = rows[kept] + 0.01 * rows[changed]
        labels[changed] = 1 - labels[kept]
        other = replace(judged, labels=labels, truth=labels)
        after, chosen = other.knn([moved])
        assert chosen[part] == choosing[part]
        assert after[kept] == correct[kept]
        assert not np.array_equal(chosen, choosing)


def test_the_best_of_many_equals_is_no_better(tmp_path: Path) -> None:
    """Forty encoders that guess: the best looks far better than one, but is not called so."""
    judged = open_judged(DataConfig(path=str(write(tmp_path, 200, 3))), "--labelled")
    guesses = [guess(judged, seed) for seed in range(40)]
    start = guess(judged, 100)
    assert best(guesses).accuracy > 0.56
    assert abs(fairly_judged(guesses, judged).mean() - 0.5) < 0.06
    knn, _ = compare_encoders(judged, [start], guesses)
    assert not knn.difference.is_better
    better = [*guesses, guess(judged, 101, signal=3.0)]
    assert compare_encoders(judged, [start], better)[0].difference.is_better


@pytest.mark.full
def test_the_choice_does_not_raise_the_score() -> None:
    """One of eight equal encoders, chosen as before on images that had the judged ones as neighbours, scores 3 points
    more than another one; chosen by the other fifths alone, it does not.
    """
    before, fair = [], []
    numbers, labels = torch.arange(50), torch.arange(50) % 2
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(2, 16, generator=generator)[labels] * 0.5 + torch.randn(50, 16, generator=generator)
        folds = torch.from_numpy(np.random.default_rng(seed).permutation(50) % 5)
        judged = JudgedImages("", None, None, labels, labels, [], folds)  # type: ignore[arg-type]
        found, naive = [], []
        for _ in range(9):
            rows = image + torch.randn(50, 16, generator=generator)
            correct, choosing = judged.knn([rows])
            found.append(Candidate("", 1, 32, False, correct, choosing, float(correct.mean()), [rows]))
            by_all = predict_by_others(rows, rows, labels, 2, judged.protocol, (numbers, numbers))
            naive.append((by_all == labels).numpy())
        fair.append(fairly_judged(found[:-1], judged).mean() - found[-1].accuracy)
        chosen = [
            max(naive[:-1], key=lambda each: each[folds != fold].mean())[folds == fold].sum() for fold in range(5)
        ]
        before.append(sum(chosen) / 50 - naive[-1].mean())
    assert np.mean(before) > 0.02
    assert abs(np.mean(fair)) < 0.01


def test_whitening_gives_equal_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3.0
    plain, again = whiten(rows, rows[:7], shrinkage=0.0)
    assert torch.allclose(plain.T @ plain / 300, torch.eye(5), atol=1e-4)
    assert torch.allclose(plain[:7], again, atol=1e-5)
    variances = np.linalg.eigvalsh(np.cov(rows.numpy().T, bias=True))[::-1]
    shrunk = whiten(rows)[0].square().mean(dim=0).numpy()
    np.testing.assert_allclose(shrunk, variances / (variances + variances.mean()), rtol=1e-4)
