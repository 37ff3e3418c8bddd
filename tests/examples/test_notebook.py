"""The notebook's code cells, run in order in one namespace, as a kernel would; committed without outputs."""

import json
import sys
from pathlib import Path

import pytest
import timm
from installing import ROOT, run

BOOK = json.loads((ROOT / "docs/examples/first_steps.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
FACTS = """
import json

scores = [score.accuracy for score in result.scores]
print(json.dumps({"folder": str(folder), "steps": run.step, "scores": scores, "shape": list(features.shape)}))
"""


def test_it_is_committed_without_outputs_and_is_python() -> None:
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in BOOK["cells"]}) == len(BOOK["cells"])
    for cell in CELLS:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    program = "\n\n".join(["".join(cell["source"]) for cell in CELLS] + [FACTS])
    printed = run([sys.executable, "-c", program], tmp_path, timeout=900, MPLBACKEND="agg", TMPDIR=str(tmp_path))
    facts = json.loads(printed.splitlines()[-1])

    folder = Path(facts["folder"])
    assert folder.parent == tmp_path
    assert facts["steps"] == 2 * (10_000 // 128)
    pretrained, random_init, _raw_pixels = facts["scores"]
    assert pretrained > random_init + 0.02
    for picture in ("views.png", "curves.png"):
        assert (folder / picture).stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0)
    assert facts["shape"] == [1, model.head_hidden_size]
