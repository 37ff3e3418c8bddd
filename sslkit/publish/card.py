"""The model card: what an exported encoder is, how to load it, and how it scored."""

import json
import re
from pathlib import Path

from sslkit.recipe import Recipe


def model_card(recipe: Recipe, run: Path, folder: Path, tag: str, license_id: str) -> str:
    """Write the card from the run's own record.

    Args:
        recipe: The run's resolved recipe.
        run: Run folder, for its scores.
        folder: Where the encoder lies, for the loading example.
        tag: timm's pretrained tag.
        license_id: SPDX id.
    """
    method = recipe.method_name
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license: {license_id}
tags:
- image-feature-extraction
- timm
- self-supervised-learning
- {method.replace("_", "")}
---
# {recipe.backbone.name}.{tag}

A `{recipe.backbone.name}` image encoder pretrained without labels by `{method}` with
[sslkit](https://pypi.org/project/sslkit/). Input {recipe.views.size} x {recipe.views.size} pixels.

{_loading(recipe, folder)}
## Training

| | |
| --- | --- |
| method | `{method}` |
| data | `{recipe.data.title}`, split `{recipe.data.split}` |
| epochs, global batch | {recipe.train.epochs}, {recipe.train.batch_size} |
| optimizer, peak learning rate | {recipe.optim.name}, {recipe.peak_lr:g} |

The whole recipe, every number resolved, is in `recipe.toml` beside this card.

## Scores

{_scores(run)}
"""


def _loading(recipe: Recipe, folder: Path) -> str:
    if recipe.backbone.small_stem:
        return (
            "Its stem for small images is not one timm can build, so sslkit loads it:\n\n```python\n"
            f'from sslkit.evaluate import load_encoder\n\nencoder = load_encoder("{folder.name}").module.eval()\n```\n'
        )
    return (
        "```python\nimport timm\n\n"
        f'encoder = timm.create_model("local-dir:{folder.name}", pretrained=True, num_classes=0).eval()\n```\n'
    )


def _scores(run: Path) -> str:
    file = run / "results.jsonl"
    if not file.is_file():
        return "None recorded."
    try:
        latest = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "None that can be read."
    newest: dict[tuple[str, str], tuple[str, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            if latest == f"step-{row['step']:08d}":
                measure = str(row.get("measure", "top-1 accuracy"))
                newest[_cell(row["evaluation"]), _cell(row["data"])] = _cell(measure), float(row["accuracy"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a line of a run that was killed
            continue
    if not newest:
        return "None recorded for these weights."
    cells = [
        f"| {name} | {data} | {measure} | {100 * score:.1f} % |" for (name, data), (measure, score) in newest.items()
    ]
    return "\n".join(["| protocol | data | measure | score |", "| --- | --- | --- | --- |", *cells])


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table: no line or cell of its own, no HTML, no link."""
    return re.sub(r"([\\|<>\[\]`])", r"\\\1", " ".join(str(text).split()))
