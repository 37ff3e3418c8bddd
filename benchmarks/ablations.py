"""Run the ablations of `ablations.toml`, every cell with every seed, and write docs/ablations.md with a figure.

    python benchmarks/ablations.py [--jobs 2] [--only "Momentum"] [--seeds 1] [--fill] [--report]

Each cell is a training run in `runs/ablations`, in a separate process. A finished run is not repeated; a stopped run
continues. Results are stored in `ablations_measured.json`, and the page is written from them. `--fill` trains only the
missing cells, `--report` none.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from ablations_page import write_page
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sslkit
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine.monitor.alarms import SpikeDetector
from sslkit.engine.monitor.knn_monitor import make_knn_monitor
from sslkit.engine.setup import build_method
from sslkit.recipe.resolve import Recipe, build_recipe

HERE = Path(__file__).parent
MEASURED = HERE / "ablations_measured.json"
RUNS = HERE.parent / "runs" / "ablations"
COLOURED = RUNS / "coloured"


@dataclass(frozen=True)
class Cell:
    """One setting of one ablation, with one seed."""

    group: str
    label: str
    seed: int
    shows: str
    tables: dict[str, dict[str, Any]]

    def recipe(self) -> Recipe:
        """The recipe to train."""
        return build_recipe(self.tables, name=f"ablations.toml {self.group}: {self.label}")

    @property
    def key(self) -> str:
        """Hash of the cell. It changes with every setting in `ablations.toml`."""
        text = json.dumps([self.group, self.tables], sort_keys=True).replace(str(COLOURED), "COLOURED")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return RUNS / self.key


def lay_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge tables. A table that sets a name replaces the whole table."""
    laid = {table: dict(keys) for table, keys in base.items()}
    for table, keys in over.items():
        laid[table] = dict(keys) if "name" in keys else {**laid.get(table, {}), **keys}
    return laid


def read_cells(only: str, seeds: int) -> list[Cell]:
    """All cells of `ablations.toml`, ordered by seed, so that an early stop leaves complete rows."""
    text = (HERE / "ablations.toml").read_text(encoding="utf-8").replace("COLOURED", str(COLOURED))
    spec = tomllib.loads(text)
    cells = []
    for seed in spec["seeds"][: seeds or None]:
        for group in spec["group"]:
            if only.lower() not in group["name"].lower():
                continue
            for cell in group["cells"]:
                tables = spec["base"]
                for over in [*(spec["preset"][name] for name in cell.get("use", [])), cell.get("set", {})]:
                    tables = lay_over(tables, over)
                tables = lay_over(tables, {"train": {"seed": seed}})
                cells.append(Cell(group["name"], cell["label"], seed, group.get("shows", ""), tables))
    return cells


def make_coloured() -> None:
    """The bundled garments, each with two random colours: colour distinguishes images, but not classes."""
    if (COLOURED / "test").is_dir():
        return
    for split in ("train", "test"):
        source = open_source(DataConfig(path="builtin:fashion_mnist", split=split))
        labels, names = source.labels(), source.class_names()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": list(coloured(source, split)), "label": [names.index(label) for label in labels]}
        (COLOURED / split).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(COLOURED / split / "data.parquet")


def coloured(source: Any, split: str) -> Iterator[dict[str, Any]]:
    """PNG bytes of every image. Grey levels are mapped between a dark and a bright colour."""
    draws = np.random.default_rng([0, split == "test"])
    for index in range(len(source)):
        share = source.read(index)[..., :1].astype(np.float64) / 255
        dark, bright = draws.uniform(0, 130, 3), draws.uniform(125, 255, 3)
        pixels = np.rint(dark * (1 - share) + bright * share).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        yield {"bytes": buffer.getvalue(), "path": None}


def train_cell(cell: Cell) -> None:
    """Train the cell unless it is finished, and write cell.json into its run folder."""
    run = sslkit.train(cell.recipe(), cell.folder)
    metrics = run.metrics()
    result: dict[str, Any] = {"knn": run.results()[-1]["accuracy"]}
    result["pretext"] = float(np.mean([row["accuracy"] for row in metrics[-20:]]))
    if cell.shows == "spikes":
        result |= spikes(metrics)
    if cell.shows == "head":
        result["after_head"] = knn_after_head(cell, run.folder)
    (cell.folder / "cell.json").write_text(json.dumps(result), encoding="utf-8")


def spikes(metrics: list[dict[str, Any]]) -> dict[str, int]:
    """Number of steps with over twice the gradient norm of the last twenty, and in how many the first layer led."""
    detector, found = SpikeDetector(factor=2.0), []
    for row in metrics:
        layers = {name: value for name, value in row.items() if name.startswith("gradient/")}
        if (spike := detector.update(row["step"], row["grad_norm"], layers)) is not None:
            found.append(spike)
    return {"spikes": len(found), "first_layer": sum(bool(spike.first_layer_first) for spike in found)}


def knn_after_head(cell: Cell, folder: Path) -> float:
    """kNN accuracy on the projector's output, with the monitor's protocol."""
    recipe = cell.recipe()
    method = build_method(recipe)
    newest = (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    method.load_state_dict(load_file(folder / "checkpoints" / newest / "model.safetensors"))
    monitor = make_knn_monitor(recipe, torch.device("cpu"), 0)
    assert monitor is not None
    return monitor(nn.Sequential(method.backbone, method.projector))


def run_cell(cell: Cell) -> str:
    """Run one cell in a separate process. Returns the line to print."""
    name = f"{cell.group}: {cell.label}, seed {cell.seed}"
    if not (cell.folder / "cell.json").is_file():
        command = [sys.executable, __file__, "--cell", cell.group, cell.label, str(cell.seed)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            return f"{name}: FAILED: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    result = json.loads((cell.folder / "cell.json").read_text(encoding="utf-8"))
    return f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items())


def read_measured() -> dict[str, dict[str, float]]:
    """Results by cell key: the committed ones, replaced by runs on this machine."""
    measured: dict[str, dict[str, float]] = (
        json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    )
    for cell in read_cells("", 0):
        if (cell.folder / "cell.json").is_file():
            measured[cell.key] = json.loads((cell.folder / "cell.json").read_text(encoding="utf-8"))
    return measured


def save_measured() -> dict[tuple[str, str, int], dict[str, float]]:
    """Write `ablations_measured.json` without removed cells. Returns results by group, label and seed."""
    measured, cells = read_measured(), read_cells("", 0)
    kept = {cell.key: measured[cell.key] for cell in cells if cell.key in measured}
    MEASURED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return {(cell.group, cell.label, cell.seed): kept[cell.key] for cell in cells if cell.key in kept}


def main() -> None:
    """Run the missing cells, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds; 0: all")
    parser.add_argument("--fill", action="store_true", help="train only the missing cells")
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells = read_cells(arguments.only, arguments.seeds)
    if arguments.cell:
        group, label, seed = arguments.cell
        train_cell(next(c for c in cells if (c.group, c.label, c.seed) == (group, label, int(seed))))
        return
    if not arguments.report:
        make_coloured()
        there = read_measured() if arguments.fill else {}
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for line in pool.map(run_cell, [cell for cell in cells if cell.key not in there]):
                print(line, flush=True)
                save_measured()
    spec = tomllib.loads((HERE / "ablations.toml").read_text(encoding="utf-8"))
    print(write_page(spec, save_measured(), HERE.parent / "docs"))


if __name__ == "__main__":
    main()
