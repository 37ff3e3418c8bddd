"""The parts serve a loop that is not ours: the documented one learns, and needs neither engine nor accelerate."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import Tensor, nn

import sslkit
from sslkit.data.augment.cpu import normalise
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.evaluate import knn_accuracy

FILE = Path(__file__).parents[2] / "docs/examples/own_loop.py"
ALONE = """
import importlib, pkgutil, sys

sys.modules["accelerate"] = None  # an import of it fails
import sslkit.data, sslkit.evaluate, sslkit.methods, sslkit.parts

for room in (sslkit.parts, sslkit.data, sslkit.methods):
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
assert not [name for name in sys.modules if name.startswith(("sslkit.engine", "sslkit.cli", "sslkit.recipe.resolve"))]
"""


@pytest.fixture(scope="module")
def own_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_loop", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(encoder: nn.Module, split: str, count: int) -> tuple[Tensor, Tensor]:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split=split))
    pixels = torch.stack([torch.from_numpy(source.read(index)) for index in range(count)])
    names = source.class_names()
    labels = torch.tensor([names.index(label) for label in source.labels()[:count]])
    with torch.inference_mode():
        batches = normalise(pixels, (0.286,) * 3, (0.353,) * 3).split(250)
        return torch.cat([encoder.eval()(batch) for batch in batches]), labels


def score(encoder: nn.Module) -> float:
    return knn_accuracy(*features(encoder, "train", 5000), *features(encoder, "test", 2000))


@pytest.mark.slow
def test_the_loop_of_the_docs_learns(own_loop: ModuleType) -> None:
    torch.manual_seed(0)
    encoder = timm.create_model("test_mambaout", num_classes=0)
    before = score(encoder)
    losses = own_loop.pretrain(encoder.train(), steps=150)
    assert min(losses[-10:]) < losses[20]  # the first 16 steps fill the queue, and are easy
    assert score(encoder) > before + 0.02  # 0.045 when written; its standard error is about 0.01


@pytest.mark.slow
def test_without_a_learning_rate_it_does_not(own_loop: ModuleType) -> None:
    torch.manual_seed(0)
    encoder = timm.create_model("test_mambaout", num_classes=0)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    own_loop.pretrain(encoder.train(), steps=2, lr=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.full
def test_parts_data_and_methods_stand_without_the_engine() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    named = set(done.stdout.split())
    files = (Path(sslkit.__file__).parent / "parts").glob("[a-z]*.py")
    assert {f"sslkit.parts.{file.stem}" for file in files} <= named
