"""Run by test_processes.py on two processes: the doctor on sound methods and on ones that forget the other process.

Prints one line of JSON from rank 0: {what was run: [verdict, sentence] of "processes agree"}.
"""

import json
import os
from typing import Any
from unittest.mock import patch

from conftest import small_recipe
from torch import Tensor

from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import rank
from sslkit.doctor import Finding, check_recipe, run_checks
from sslkit.doctor.process_checks import train_and_compare
from sslkit.engine.accelerator import make_accelerator
from sslkit.methods import moco_v1
from sslkit.parts import memory_bank as bank
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.recipe.resolve import Recipe

FOUND: dict[str, list[str]] = {}
MOVE = MomentumTeacher.update


def as_is(rows: Tensor) -> Tensor:
    return rows


def move_on_first(self: MomentumTeacher, student: Any, momentum: float) -> None:
    if rank() == 0:
        MOVE(self, student, momentum)


def mistakes() -> dict[str, tuple[str, Any]]:
    """What is done wrong, by which method, and how."""
    return {
        "own keys queued only": ("moco_v2", patch.object(moco_v1, "gather_rows", as_is)),
        "own memories kept only": ("memory_bank", patch.object(bank, "gather_rows", as_is)),
        "teacher moved on one": ("moco_v3", patch.object(MomentumTeacher, "update", move_on_first)),
    }


def check_all(recipe: Recipe, source: ImageSource) -> Finding:
    """In place of `check_processes`: one process group for everything, as a second one cannot be opened."""
    accelerator = make_accelerator(recipe)

    def keep(name: str, method: str) -> None:
        finding = train_and_compare(accelerator, small_recipe(method, "test_vit"), source)
        FOUND[name] = [finding.verdict, finding.sentence]

    for method in ("moco_v3", "memory_bank"):
        keep(method, method)
    for name, (method, mistake) in mistakes().items():
        with mistake:
            keep(name, method)
    sound = train_and_compare(accelerator, recipe, source)
    accelerator.end_training()
    accelerator.state._reset_state(reset_partial_state=True)
    return sound


def main() -> None:
    with patch.object(run_checks, "check_processes", check_all):
        report = check_recipe(small_recipe("moco_v2", "test_resnet"))
    if os.environ["RANK"] != "0":
        assert report.findings == []
        return
    assert report.of("fault") == []
    (agree,) = [finding for finding in report.findings if finding.check == "processes agree"]
    print("RESULT " + json.dumps({**FOUND, "moco_v2": [agree.verdict, agree.sentence]}), flush=True)


if __name__ == "__main__":
    main()
