"""The experiments behind the rules of the plan that `sslkit pretrain --data` makes; see docs/plan.md.

    python benchmarks/plan_experiments.py runs/small_sets [--only NAME ...] [--sets NAME ...] [--seeds 0 1 2] [--jobs 2]

Each cell (variant, set, seed) trains with one thread in a process of its own and is scored by `own_scorer.py`. Results
are kept in `plan_measured.json` by the content of the cell. Finished cells are not repeated.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from own_scorer import colours, load_encoder, pixels, score
from small_sets import load

from sslkit.engine import train
from sslkit.plan.make_plan import make_plan
from sslkit.recipe.resolve import build_recipe

HERE = Path(__file__).parent
PLAN = "plan"  # the variant that is what `sslkit pretrain --data` does
SHOWN = ("knn5", "knn20", "knn20_majority", "logistic")
MEASURED, VARIANTS = HERE / "plan_measured.json", HERE / "plan_experiments.toml"


def cell_tables(spec: dict[str, Any], variant: str, name: str, seed: int) -> dict[str, dict[str, Any]]:
    """The recipe of a cell: the base, the set's own values, the variant's, the seed."""
    flat: dict[str, Any] = dict(spec["base"])
    chosen = spec["variant"][variant]
    for layer in (spec["set"][name], chosen.get("all", {}), chosen.get(name, {}), {"train.seed": seed}):
        flat |= layer
    for key in chosen.get("without", []):
        flat.pop(key, None)
    return nested(flat)


def planned_tables(spec: dict[str, Any], name: str, seed: int, sets: Path) -> dict[str, dict[str, Any]]:
    """The recipe that the plan makes for the images, with the backbone and the epochs of the cells."""
    same = ("backbone.name", "train.log_every", "data.workers", "checkpoint.every_minutes")
    flat = {key: spec["base"][key] for key in same} | {"train.seed": seed}
    flat["train.epochs"] = spec["set"][name]["train.epochs"]
    plan = make_plan(nested({**flat, "data.path": load(name, sets).path}), hours=None)
    flat |= {choice.key: choice.value for choice in plan.choices if not choice.key.startswith("monitor.")}
    return nested({**flat, "monitor.diagnose_every": 0})


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of a recipe from its keys with dots."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        target: dict[str, Any] = tables
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return tables


def digest(tables: dict[str, Any], name: str) -> str:
    """The identity of a cell."""
    return hashlib.sha256(json.dumps([name, tables], sort_keys=True).encode()).hexdigest()[:16]


def run_cell(tables: dict[str, Any], name: str, sets: Path, folder: Path) -> dict[str, Any]:
    """Train and score one cell in this process."""
    torch.set_num_threads(1)
    images = load(name, sets)
    tables = {**tables, "data": {**tables.get("data", {}), "path": images.path}}
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    train(build_recipe(tables), folder)
    seconds = time.perf_counter() - started
    scores = score(load_encoder(folder / "encoder"), images)
    shutil.rmtree(folder)
    return {**scores, "seconds": round(seconds, 1)}


def baselines(name: str, sets: Path, size: int, seed: int, backbone: str) -> dict[str, dict[str, float]]:
    """Scores of raw pixels, of a histogram of colours and of random weights."""
    images = load(name, sets)
    torch.manual_seed(seed)
    model = timm.create_model(backbone, num_classes=0).eval()
    model.pretrained_cfg["input_size"] = (3, size, size)
    return {
        "raw pixels": pixels(images, size),
        "colour histogram": colours(images),
        "random weights": score(model, images),
    }


def report(measured: dict[str, Any]) -> str:
    """A table of means over seeds, one row a variant: the scores of `SHOWN`."""
    rows: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for cell in measured.values():
        rows[cell["variant"]][cell["set"]].append([cell["scores"].get(key, np.nan) for key in SHOWN])
    names = sorted({name for row in rows.values() for name in row})
    lines = ["| variant | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for variant, row in rows.items():
        texts = []
        for name in names:
            found = np.array(row[name])
            texts.append(
                " / ".join("-" if np.isnan(x) else f"{x:.1f}" for x in found.mean(axis=0)) + f" (n {len(found)})"
                if len(found)
                else ""
            )
        lines.append(f"| {variant} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def missing_cells(spec: dict[str, Any], measured: dict[str, Any], words: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that were asked for and are not measured."""
    cells = []
    for seed, variant, name in itertools.product(words.seeds, words.only or [PLAN, *spec["variant"]], words.sets):
        if variant == PLAN:
            tables = planned_tables(spec, name, seed, words.folder)
        else:
            tables = cell_tables(spec, variant, name, seed)
        if digest(tables, name) not in measured:
            cells.append({"variant": variant, "set": name, "seed": seed, "tables": tables})
    return cells


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of small_sets.py")
    parser.add_argument("--only", nargs="*", help="variants")
    parser.add_argument("--sets", nargs="*", default=["emoji", "tiles", "garments"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--baselines", action="store_true", help="only score raw pixels, colours and random weights")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cell:
        cell = json.loads(words.cell)
        folder = HERE.parent / "runs" / "plan" / digest(cell["tables"], cell["set"])
        print(json.dumps(run_cell(cell["tables"], cell["set"], words.folder, folder)))
        return
    spec = tomllib.loads(VARIANTS.read_text(encoding="utf-8"))
    if words.baselines:
        for name, size in itertools.product(words.sets, (32, 64)):
            print(name, size, baselines(name, words.folder, size, words.seeds[0], spec["base"]["backbone.name"]))
        return
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    cells = missing_cells(spec, measured, words)

    def run(cell: dict[str, Any]) -> None:
        arguments = [sys.executable, __file__, str(words.folder), "--cell", json.dumps(cell)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(cell["variant"], cell["set"], cell["seed"], "failed:", done.stderr[-500:], flush=True)
            return
        scores = json.loads(done.stdout.splitlines()[-1])
        now = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
        key = digest(cell["tables"], cell["set"])
        now[key] = {"variant": cell["variant"], "set": cell["set"], "seed": cell["seed"], "scores": scores}
        MEASURED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        print(cell["variant"], cell["set"], cell["seed"], scores, flush=True)

    with ThreadPoolExecutor(words.jobs) as pool:
        list(pool.map(run, cells))
    print(report(json.loads(MEASURED.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
