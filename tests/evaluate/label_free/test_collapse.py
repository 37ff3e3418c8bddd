"""Label-free numbers against their formulas, written again in NumPy and SciPy, and against cases known by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import small_recipe
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from torch import Tensor

import sslkit
from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError
from sslkit.evaluate import diagnose_encoder
from sslkit.evaluate.label_free.collapse_metrics import (
    HISTOGRAM_EDGES,
    alignment,
    alpha_req,
    effective_rank,
    embedding_std,
    label_free_metrics,
    lidar,
    pretext_top1,
    similarity_histograms,
    uniformity,
)

Array = NDArray[np.float64]


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Embeddings off the origin, some directions stronger than others."""
    draws = np.random.default_rng(seed)
    mixing = draws.normal(size=(shape[-1], shape[-1])) * np.arange(1, shape[-1] + 1) ** -0.7
    return torch.from_numpy(draws.normal(size=shape) @ mixing.T + draws.normal(size=shape[-1]))


def unit(rows: Tensor) -> Array:
    array = rows.numpy()
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def entropy_rank(values: Array) -> float:
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("shape", [(50, 8), (20, 33)])
def test_std_and_rank(shape: tuple[int, int]) -> None:
    z = correlated(*shape)
    assert embedding_std(z) == pytest.approx(unit(z).std(axis=0, ddof=1).mean(), rel=1e-9)
    assert effective_rank(z) == pytest.approx(entropy_rank(np.linalg.svd(z.numpy(), compute_uv=False)), rel=1e-6)


def test_std_and_rank_of_known_cases() -> None:
    even = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert embedding_std(even) == pytest.approx(64**-0.5, rel=0.02)
    assert effective_rank(even) == pytest.approx(64, rel=0.02)
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    point = torch.ones(30, 5)
    assert embedding_std(point) == 0.0
    assert effective_rank(point) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.zeros(30, 5)) == 1.0
    line = torch.linspace(-1, 1, 30)[:, None] * torch.ones(5)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("shape", [(12, 5, 6), (6, 3, 40)])  # fewer and more dimensions than rows
def test_lidar(shape: tuple[int, int, int]) -> None:
    z = correlated(*shape)
    images, views, width = shape
    means = z.numpy().mean(axis=1)
    between, within = np.zeros((width, width)), np.zeros((width, width))
    for i in range(images):
        between += np.outer(means[i] - means.mean(axis=0), means[i] - means.mean(axis=0)) / images
        for j in range(views):
            within += np.outer(z[i, j].numpy() - means[i], z[i, j].numpy() - means[i]) / (images * views)
    root = scipy.linalg.inv(scipy.linalg.sqrtm(within + 1e-4 * np.eye(width)).real)
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    assert lidar(z) == pytest.approx(entropy_rank(eigenvalues), rel=1e-5)


def test_lidar_counts_what_tells_images_apart_and_not_views() -> None:
    draws = torch.Generator().manual_seed(0)
    image, view = (torch.randn(*shape, generator=draws) for shape in ((200, 1, 10), (200, 8, 10)))
    informative = torch.zeros(200, 8, 10)
    informative[..., :3] = 10 * image[..., :3]
    informative[..., 3:] += 10 * view[..., 3:]  # as large, but it differs from view to view
    rows = informative + 0.1 * view
    assert lidar(rows) == pytest.approx(3.0, abs=0.1)
    assert effective_rank(rows.flatten(0, 1)) > 9


def test_alpha_is_the_exponent_of_the_spectrum() -> None:
    draws = np.random.default_rng(0)
    directions = np.linalg.qr(draws.normal(size=(300, 120)))[0]
    directions = np.linalg.qr(directions - directions.mean(axis=0))[0]
    for exponent in (0.5, 1.0, 2.5):
        rows = directions * np.arange(1, 121) ** (-exponent / 2)
        assert alpha_req(torch.from_numpy(rows)) == pytest.approx(exponent, abs=1e-6)
    z = correlated(400, 150)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.numpy().T))[::-1]
    ranks = np.arange(11, 101)
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues[10:100]), 1, w=ranks**-0.5)[0]
    assert alpha_req(z) == pytest.approx(-slope, rel=1e-6)
    assert alpha_req(correlated(400, 19)) is None
    assert alpha_req(correlated(20, 400)) is None
    assert alpha_req(torch.ones(400, 150)) is None


def test_alignment_and_uniformity() -> None:
    first, second = correlated(40, 6), correlated(40, 6, seed=1)
    x, y = unit(first), unit(second)
    assert alignment(first, second) == pytest.approx((np.linalg.norm(x - y, axis=1) ** 2).mean(), rel=1e-9)
    assert uniformity(first) == pytest.approx(math.log(np.exp(-2 * pdist(x, "sqeuclidean")).mean()), rel=1e-9)
    assert alignment(first, 3 * first) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0.0, abs=1e-9)
    even = torch.randn(800, 256, generator=torch.Generator().manual_seed(0))
    assert uniformity(even) == pytest.approx(-4.0, abs=0.05)


def test_histograms_and_top1() -> None:
    first, second = correlated(40, 6), correlated(40, 6)
    second = second + 0.5 * correlated(40, 6, seed=3)
    similarity = unit(first) @ unit(second).T
    own = np.eye(40, dtype=bool)
    positive, negative = similarity_histograms(first, second)
    assert positive == np.histogram(similarity[own], HISTOGRAM_EDGES)[0].tolist()
    assert negative == np.histogram(similarity[~own], HISTOGRAM_EDGES)[0].tolist()
    assert (sum(positive), sum(negative)) == (40, 40 * 39)
    assert pretext_top1(first, second) == pytest.approx((similarity.argmax(axis=1) == np.arange(40)).mean())
    assert pretext_top1(torch.ones(9, 4), torch.ones(9, 4)) == 0.0
    assert similarity_histograms(torch.ones(9, 4), 2 * torch.ones(9, 4))[0][-1] == 9  # rounding over 1 is counted


def test_all_numbers_together_are_the_single_ones() -> None:
    z = correlated(60, 4, 50).float()
    found = label_free_metrics(z)
    both = torch.cat([z[:, 0], z[:, 1]])
    assert found.effective_rank == pytest.approx(effective_rank(both), rel=1e-6)
    assert found.lidar == pytest.approx(lidar(z))
    assert found.alpha_req == pytest.approx(alpha_req(both))
    assert label_free_metrics(z[:, :2]).lidar is None
    assert "lidar" not in label_free_metrics(z[:, :2]).to_dict()


def test_a_trained_encoder_beside_its_random_twin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sslkit.train(small_recipe("moco_v2", "test_resnet", train={"max_steps": 4}), tmp_path / "run")
    data = DataConfig(path="builtin:fashion_mnist")
    diagnosis = diagnose_encoder(str(tmp_path / "run"), data, images=32, views=3)
    own, twin = diagnosis.encoders
    assert (own.encoder, twin.encoder, own.dim) == (str(tmp_path / "run"), "random init", 96)
    assert own.numbers != twin.numbers
    assert 1 <= own.numbers.lidar <= 31
    assert own.numbers == diagnose_encoder(str(tmp_path / "run"), data, images=32, views=3).encoders[0].numbers
    words = ["eval", "diagnose", str(tmp_path / "run"), "--data", data.path, "--images", "32", "--views", "3"]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *extra])
        assert stop.value.code == 0
    table, _, line = capsys.readouterr().out.rpartition('{"data"')
    assert "effective_rank" in table
    verdict = f"{own.numbers.effective_rank:.3g} effective directions, "
    assert verdict in table
    assert f"than random init ({twin.numbers.effective_rank:.3g})" in " ".join(table.split())
    printed = json.loads('{"data"' + line)
    assert printed["contestants"][0]["numbers"]["effective_rank"] == own.numbers.effective_rank
    assert printed["alarms"] == []


def test_images_need_no_labels_and_one_is_too_few(class_folders: Path, tmp_path: Path) -> None:
    sslkit.train(small_recipe("moco_v2", "test_vit", train={"max_steps": 1}), tmp_path / "run")
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, picture in enumerate(sorted(class_folders.rglob("*.png"))[:5]):
        (flat / f"{number}.png").write_bytes(picture.read_bytes())
        if number == 0:
            with pytest.raises(UserError, match=r"--images: needs at least 2 images to compare, but takes 1 of"):
                diagnose_encoder(str(tmp_path / "run"), DataConfig(path=str(flat)))
    assert diagnose_encoder(str(tmp_path / "run"), DataConfig(path=str(flat)), views=2).images == 5
