"""Write docs/ablations.md and its figure from the finished cells."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Found = dict[tuple[str, str, int], dict[str, float]]

HEAD = """# Ablations

Ablations from the papers, repeated at a size that two CPU cores can train: {base}. The question is **in which direction
each setting changes the score**, not how high it is. `benchmarks/ablations.toml` has every number.

```bash
make ablations
```

This runs the missing settings (a few hours; it can be stopped and continued) and writes this page. Scores are kNN top-1
on 2 000 test images, mean and range over the seeds. The standard error of one score is about 0.8 points.

![kNN of every cell](pictures/ablations.png)
"""
BASE = (
    "five epochs of the 10 000 bundled images at 28 pixels, MoCo v2 on timm's `test_mambaout` unless the row says "
    "otherwise"
)
EXTRA = {
    "pretext": ("pretext accuracy", lambda cell: f"{cell['pretext']:.1%}"),
    "spikes": (
        "steps with twice the usual gradient (first layer led)",
        lambda cell: f"{cell['spikes']:.0f} ({cell['first_layer']:.0f})",
    ),
    "head": ("kNN after the head", lambda cell: f"{cell['after_head']:.1%}"),
}


def write_page(spec: dict[str, Any], found: Found, docs: Path) -> Path:
    """Write docs/ablations.md and docs/pictures/ablations.png. Returns the path of the page."""
    sections = [HEAD.format(base=BASE)]
    for group in spec["group"]:
        rows = _rows(group, found)
        said = f"The papers: {group['claim']}." + (f" **Here:** {group['here']}." if "here" in group else "")
        sections.append(f"## {group['name']}\n\n{said}\n\n" + "\n".join(rows) + "\n")
    page = docs / "ablations.md"
    page.write_text("\n".join(sections), encoding="utf-8")
    _draw(spec, found, docs / "pictures" / "ablations.png")
    return page


def _scores(group: str, label: str, found: Found) -> list[dict[str, float]]:
    return [cell for (name, cell_label, _), cell in sorted(found.items()) if (name, cell_label) == (group, label)]


def _rows(group: dict[str, Any], found: Found) -> list[str]:
    extra = EXTRA.get(group.get("shows", ""))
    head = ["", "kNN", "range", "seeds", *([extra[0]] if extra else [])]
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for cell in group["cells"]:
        runs = _scores(group["name"], cell["label"], found)
        if not runs:
            rows.append(f"| {cell['label']} | not run |" + " |" * (len(head) - 2))
            continue
        knn = np.array([run["knn"] for run in runs]) * 100
        fields = [cell["label"], f"{knn.mean():.1f} %", f"{knn.min():.1f} to {knn.max():.1f}", str(len(runs))]
        fields += [", ".join(extra[1](run) for run in runs)] if extra else []
        rows.append("| " + " | ".join(fields) + " |")
    return rows


def _draw(spec: dict[str, Any], found: Found, file: Path) -> None:
    """Draw one panel per group, with a dot per seed and a line at their mean."""
    groups = [g for g in spec["group"] if any(_scores(g["name"], c["label"], found) for c in g["cells"])]
    if not groups:
        return
    columns = 2
    heights: dict[int, int] = defaultdict(int)
    for index, group in enumerate(groups):
        heights[index // columns] = max(heights[index // columns], len(group["cells"]))
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(11, sum(0.3 * n + 1.0 for n in heights.values())),
        squeeze=False,
        height_ratios=[n + 2.5 for n in heights.values()],
        layout="constrained",
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, group in zip(axes.flat, groups, strict=False):
        _draw_group(axis, group, found)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_group(axis: Any, group: dict[str, Any], found: Found) -> None:
    """Draw one row per cell. The axis spans at least five points, so that noise does not look like an effect."""
    labels = [cell["label"] for cell in group["cells"]]
    drawn: list[float] = []
    for height, label in enumerate(labels):
        knn = [run["knn"] * 100 for run in _scores(group["name"], label, found)]
        if knn:
            axis.plot([np.mean(knn)] * 2, [height - 0.3, height + 0.3], color="#6baed6", linewidth=3, zorder=1)
            axis.plot(knn, [height] * len(knn), "o", color="#08519c", markersize=5, alpha=0.8)
        drawn += knn
    middle, half = (min(drawn) + max(drawn)) / 2, max((max(drawn) - min(drawn)) / 2 * 1.08, 2.5)
    axis.set_xlim(middle - half, middle + half)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title(group["name"], loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("kNN top-1, %", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
