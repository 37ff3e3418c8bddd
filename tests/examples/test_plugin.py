"""The example plugin, built, installed and used: a method that sslkit itself has never heard of."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from installing import ROOT, build_wheel, install, run

from sslkit.methods import METHODS

SMALL = (
    *("method.dim=32", "method.bottleneck=8", "views.policy=small_gray", "views.size=32", "data.split=test"),
    *("data.workers=0", "train.batch_size=32", "train.max_steps=12", "train.log_every=1", "optim.lr=1.0"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the plugin alone is installed to."""
    folder = tmp_path_factory.mktemp("plugin")
    project = shutil.copytree(ROOT / "docs/examples/plugin", folder / "project")
    (folder / "dist").mkdir()
    return install(build_wheel(project, folder / "dist"), folder / "site")


@pytest.mark.full
def test_the_plugin_pretrains_by_name(installed: Path, tmp_path: Path) -> None:
    assert "simsiam" not in METHODS
    with_plugin = os.pathsep.join([str(installed), str(ROOT)])
    sslkit = [sys.executable, "-m", "sslkit"]
    listed = run([*sslkit, "methods"], tmp_path, PYTHONPATH=with_plugin)
    assert "simsiam" in listed
    assert "Exploring Simple Siamese" in listed
    assert "simsiam" not in run([*sslkit, "methods"], tmp_path, PYTHONPATH=str(ROOT))

    words = ["--method", "simsiam", "--backbone", "test_resnet", "--data", "builtin:fashion_mnist", "--output", "run"]
    small = [word for setting in SMALL for word in ("--set", setting)]
    run([*sslkit, "pretrain", *words, *small], tmp_path, PYTHONPATH=with_plugin)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert sum(losses[-4:]) / 4 < losses[0] - 0.02
    assert (tmp_path / "run/encoder/model.safetensors").is_file()
