"""The points of a run that are judged, and the folder that the answer is written to."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm

from sslkit.adapt.answer import Answer
from sslkit.engine.checkpoint.format import read_checkpoint
from sslkit.engine.checkpoint.retention import checkpoint_name, saved_steps
from sslkit.engine.logging.logger import append_result
from sslkit.errors import without_tokens
from sslkit.evaluate.features.encoder import Encoder, build_backbone
from sslkit.files.atomic import replace_text
from sslkit.files.jsonl_reader import rows_of
from sslkit.methods import find_method
from sslkit.parts.adaptation.lora import merge_lora
from sslkit.publish.encoder_folder import check_reloaded, new_folder, timm_config, write_encoder_files
from sslkit.recipe.resolve import Recipe


@dataclass(frozen=True)
class Point:
    """The encoder of a checkpoint."""

    step: int
    epoch: int
    encoder: Encoder


def points_of(run: Path, recipe: Recipe, start: Encoder) -> list[Point]:
    """The encoders of a run's checkpoints, oldest first, with the preprocessing and arguments of ``start``."""
    prefix = f"{find_method(recipe.method_name).encoder_name}."
    steps = sorted(saved_steps(run / "checkpoints"))
    points = []
    for step in steps:
        model = read_checkpoint(run / "checkpoints" / checkpoint_name(step)).model
        state = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
        module = build_backbone(start.architecture, start.model_args, small_stem=False)
        module.load_state_dict(merge_lora(state))
        epoch = max(round(recipe.train.epochs * step / steps[-1]), 1)
        points.append(Point(step, epoch, replace(start, module=module, description=f"epoch {epoch}")))
    return points


def write_answer(folder: Path, encoder: Encoder, answer: Answer, step: int, data: str) -> None:
    """Write ``encoder/`` (as timm loads it, checked), ``answer.json``, and the comparisons to the run's results.jsonl.

    Raises:
        UserError: The folder cannot be written to.
    """
    encoder.module.cpu()  # judging may have moved it to a GPU
    config = timm_config(encoder.module, encoder.preprocessing, _license(encoder))
    state = {name: value.contiguous().cpu() for name, value in encoder.module.state_dict().items()}
    tag = f"adapted_e{answer.epoch}" if answer.gained else "start"
    with new_folder(folder / "encoder") as temporary:
        write_encoder_files(config, tag, state, temporary)
        reloaded = timm.create_model(f"local-dir:{temporary}", pretrained=True, num_classes=0)
        check_reloaded(encoder.module, reloaded, (encoder.channels, answer.size, answer.size), folder / "encoder")
    replace_text(folder / "answer.json", json.dumps(answer.as_dict(), indent=1) + "\n")
    written = {row.get("evaluation") for row in rows_of(folder / "run" / "results.jsonl") if row.get("by") == "adapt"}
    for row in answer.results(step, data):
        if row["evaluation"] not in written:
            append_result(folder / "run", json.loads(without_tokens(json.dumps(row))))


def _license(encoder: Encoder) -> str:
    config: Any = getattr(encoder.module, "pretrained_cfg", None) or {}
    return str(config.get("license") or "unknown")
