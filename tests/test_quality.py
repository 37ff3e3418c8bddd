"""Slow: the quickstart's promise, trained to its end. Run by `make test-slow`."""

from pathlib import Path

import pytest

import sslkit
from sslkit.data.sources.image_source import DataConfig
from sslkit.evaluate import evaluate_knn, evaluate_linear


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_is_far_above_random_init(tmp_path: Path) -> None:
    sslkit.train(sslkit.load_recipe("quickstart"), tmp_path / "run")
    data = DataConfig(path="builtin:fashion_mnist")
    knn, linear = (judge(str(tmp_path / "run"), data).scores for judge in (evaluate_knn, evaluate_linear))
    assert [score.encoder for score in knn[1:]] == ["random init", "raw pixels"]
    assert knn[0].accuracy > knn[1].accuracy + 0.05
    assert linear[0].accuracy > linear[1].accuracy + 0.01
    assert min(knn[0].accuracy - knn[2].accuracy, linear[0].accuracy - linear[2].accuracy) > 0.015
