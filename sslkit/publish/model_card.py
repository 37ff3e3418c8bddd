"""The model card of an exported encoder: how to load it, how it was trained, and its scores."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from sslkit.files.run_reader import RunReader
from sslkit.publish.card_scores import CardScore, newest_scores
from sslkit.publish.redaction import public_score
from sslkit.recipe.resolve import Recipe
from sslkit.text import escape, pluralize

CURVES = "curves.png"
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(recipe: Recipe, run: Path, source: str, tag: str, license_id: str, *, curves: bool = False) -> str:
    """The text of the model card of a run, from its `public_recipe` and its scores; `CURVES` are in it if ``curves``.

    ``source`` loads the encoder: ``local-dir:NAME``, ``hf_hub:user/name`` or ``hf_hub:user/name@branch``. ``tag`` is
    timm's pretrained tag, and the licence an SPDX id.
    """
    scores = newest_scores(run)
    scores = scores and [public_score(score) for score in scores]
    step = RunReader(run).latest_step()
    trained = "unknown" if step is None else pluralize(step, "step")
    image = f"![Loss, pretext accuracy, learning rate and kNN over the epochs]({CURVES})\n\n" if curves else ""
    card = f"""---
{_front_matter(recipe, source, license_id, scores or [])}
---
# {recipe.backbone.name}.{tag}

A `{recipe.backbone.name}` image encoder pretrained without labels by `{recipe.method_name}` with
[sslkit](https://pypi.org/project/sslkit/). Input {recipe.views.size} x {recipe.views.size} pixels in
{recipe.views.channels} channels. It returns features; there is no classifier.

## Use

{_loading(recipe, source)}
## Training

| | |
| --- | --- |
| method | `{recipe.method_name}` |
| data | {_code(recipe.data.title)}, split {_code(str(recipe.data.split))}, labels not read |
| started from | {_start(recipe)} |
| epochs planned, global batch | {recipe.train.epochs}, {recipe.train.batch_size} |
| trained for | {trained} |
| optimizer, peak learning rate | {recipe.optim.name}, {recipe.peak_lr:g} |

The complete, resolved recipe is in `recipe.toml` in this folder.

{image}## Scores

{_scores(scores)}

## Limits

- Trained once, with one seed ({recipe.train.seed}); the intervals are for the test images, not for repeated training.
- The encoder has the content and the biases of its training images; sslkit does not filter or check them.
- Only scores with the same data and the same protocol hash are comparable.
"""
    return "\n".join(map(escape, card.split("\n")))  # no control characters for terminals


def _front_matter(recipe: Recipe, source: str, license_id: str, scores: list[CardScore]) -> str:
    """The card's YAML metadata, with a ``model-index`` of the scores that have a protocol."""
    results = [_eval_result(score) for score in scores if score.protocol_hash]
    name = source.partition(":")[2].partition("@")[0].rpartition("/")[2]
    library = "sslkit" if recipe.backbone.small_stem else "timm"  # the library that can load it
    card = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        license=license_id.lower(),  # the Hub's spelling of SPDX's Apache-2.0
        tags=["image-feature-extraction", library, "self-supervised-learning", recipe.method_name.replace("_", "")],
        datasets=_hub_datasets(recipe) or None,
        base_model=_base_model(recipe),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()


def _eval_result(score: CardScore) -> EvalResult:
    # The Hub's names of tasks.
    task = "object-detection" if score.evaluation.startswith("detect") else "image-classification"
    name = " ".join(score.data.split())
    return EvalResult(
        task_type=task,
        task_name=f"{score.evaluation} on frozen features" if score.evaluation.startswith("knn") else score.evaluation,
        dataset_type=re.sub(r"[^\w./-]+", "-", name.partition(": ")[0]).strip("-") or "images",
        dataset_name=name,
        metric_type="accuracy" if "accuracy" in score.measure else re.sub(r"\W+", "-", score.measure.lower()),
        metric_name=f"{score.measure} (protocol {score.protocol_hash})",
        metric_value=round(100 * score.value, 2),
    )


def _hub_datasets(recipe: Recipe) -> list[str]:
    """The paths of the data that look like Hub ids and are no local folders or files."""
    paths = [recipe.data.path] if recipe.data.path else [each.path for each in recipe.data.mix or []]
    return [path for path in paths if DATASET_ID.fullmatch(path) and not Path(path).exists()]


def _base_model(recipe: Recipe) -> str | None:
    """The Hub repository of the pretrained weights that the run started from, if any."""
    pretrained = recipe.backbone.pretrained
    if isinstance(pretrained, str) and pretrained.startswith(("hf_hub:", "hf-hub:")):
        return pretrained.partition(":")[2].partition("@")[0]
    return None


def _start(recipe: Recipe) -> str:
    pretrained = recipe.backbone.pretrained
    if not pretrained:
        return "random weights"
    return "timm's pretrained weights" if pretrained is True else _code(pretrained)


def _loading(recipe: Recipe, source: str) -> str:
    kind, _, plain = source.partition(":")
    plain, _, branch = plain.partition("@") if kind == "hf_hub" else (plain, "", "")
    of_branch = f', revision="{branch}"' if branch else ""
    if recipe.backbone.small_stem:
        known_as = plain if source.startswith("local-dir:") else source
        return (
            "timm cannot build its stem for small images, so load it with sslkit:\n\n```python\n"
            f'from sslkit.evaluate import load_encoder\n\nencoder = load_encoder("{known_as}").module.eval()\n```\n'
        )
    return f"""```python
import timm

encoder = timm.create_model("{source}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
# features of a PIL image: encoder(transform(image).unsqueeze(0))
```

transformers, with timm installed, returns the same features as `pooler_output`:

```python
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{plain}"{of_branch}).eval()
```
"""


def _scores(scores: list[CardScore] | None) -> str:
    if scores is None:
        return "The scores cannot be read."
    if not scores:
        return "None recorded for these weights."
    rows = ["| evaluation | data | measure | score | 95 % interval | baselines | protocol |"]
    rows.append("| --- " * 7 + "|")
    for score in scores:
        interval = "{:.1%} to {:.1%}".format(*score.interval) if score.interval else "not computed"
        others = ", ".join(f"{_cell(name)} {value:.1%}" for name, value in score.others.items())
        protocol = f"`{_cell(score.protocol_hash)}`" if score.protocol_hash else "during training"
        cells = [_cell(score.evaluation), _cell(score.data), _cell(score.measure), f"{score.value:.1%}"]
        rows.append(f"| {' | '.join([*cells, interval, others, protocol])} |")
    return "\n".join(rows)


def _code(text: str) -> str:
    """Text as code in a table cell. A backslash in code is literal, so only pipes can be escaped."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", r"\|") + "`"


def _cell(text: str) -> str:
    """Text in a Markdown table cell, without line breaks, pipes, HTML and links."""
    return re.sub(r"([\\|<>\[\]`])", r"\\\1", " ".join(str(text).split()))
