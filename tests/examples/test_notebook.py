"""The notebooks' code cells, run in order in one namespace, as a kernel would; committed without outputs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from installing import ROOT, run

NOTEBOOKS = ("first_steps", "own_images")
FIRST_STEPS = """
import json

scores = [score.accuracy for score in result.scores]
print(json.dumps({"folder": str(folder), "steps": run.step, "scores": scores, "shape": list(features.shape)}))
"""
OWN_IMAGES = """
import json

classes = [file.parent.name for file in files]
same = [[classes[index] == classes[row[0]] for index in row[1:]] for row in neighbours.tolist()]
knn = {"scores": [score.accuracy for score in result.scores], "monitored": len(scores)}
steps = plan.recipe.train.epochs * (len(source) // plan.recipe.train.batch_size)
facts = {"steps": [run.step, steps], "shape": list(features.shape), "same": same, "batch": plan.recipe.train.batch_size}
print(json.dumps({"folder": str(folder), **knn, **facts}))
"""


def cells_of(name: str) -> list[dict[str, Any]]:
    book = json.loads((ROOT / f"docs/examples/{name}.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def program_of(name: str, printed: str) -> str:
    """The code of a notebook, and a line of facts about what it made."""
    return "\n\n".join(["".join(cell["source"]) for cell in cells_of(name)] + [printed])


def facts_of(program: str, folder: Path) -> dict[str, Any]:
    printed = run([sys.executable, "-c", program], folder, timeout=900, MPLBACKEND="agg", TMPDIR=str(folder))
    facts: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert Path(facts["folder"]).parent == folder
    return facts


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_without_outputs_and_is_python(name: str) -> None:
    for cell in cells_of(name):
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_steps_run_from_top_to_bottom(tmp_path: Path) -> None:
    facts = facts_of(program_of("first_steps", FIRST_STEPS), tmp_path)
    folder = Path(facts["folder"])
    assert facts["steps"] == 2 * (10_000 // 128)
    pretrained, random_init, _raw_pixels = facts["scores"]
    assert pretrained > random_init + 0.02
    for picture in ("views.png", "curves.png"):
        assert (folder / picture).stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0)
    assert facts["shape"] == [1, model.head_hidden_size]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_images_run_from_top_to_bottom(tmp_path: Path) -> None:
    """Trained for about a minute; what such a run must show is that neighbours are much better than chance, 10 %."""
    program = program_of("own_images", OWN_IMAGES)
    assert "hours = 0.05\n" in program
    facts = facts_of(program.replace("hours = 0.05\n", "hours = 0.02\n"), tmp_path)
    folder = Path(facts["folder"])
    assert facts["steps"][0] == facts["steps"][1]
    assert facts["steps"][0] > 10
    assert facts["monitored"] >= 2
    assert len(facts["scores"]) >= 3  # the encoder, random weights and raw pixels
    assert facts["scores"][0] > 0.4
    assert sum(map(sum, facts["same"])) >= 12  # of 30
    for picture in ("views.png", "curves.png", "neighbours.png"):
        assert (folder / picture).stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0)
    assert facts["shape"] == [600, model.head_hidden_size]
