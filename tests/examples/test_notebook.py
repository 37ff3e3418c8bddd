"""The notebook's code cells, run in order in one namespace, as a kernel would; committed without outputs."""

import json
import subprocess
import sys
from pathlib import Path

import timm

FILE = Path(__file__).parents[2] / "docs/examples/first_steps.ipynb"
FACTS = """
import json

scores = {score.encoder: score.accuracy for score in judgement.scores}
print(json.dumps({"folder": str(folder), "steps": run.step, "scores": scores, "shape": list(features.shape)}))
"""


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    book = json.loads(FILE.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)

    program = "\n\n".join(["".join(cell["source"]) for cell in code] + [FACTS])
    environment = {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = run_program(program, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])

    folder = Path(facts["folder"])
    assert folder.parent == tmp_path
    assert facts["steps"] == 10_000 // 128
    own, random_init, raw_pixels = facts["scores"].values()
    assert min(own, random_init, raw_pixels) > 0.6
    assert (folder / "views.png").stat().st_size > 10_000
    assert (folder / "curves.png").stat().st_size > 10_000
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0)
    assert facts["shape"] == [1, model.head_hidden_size]


def run_program(program: str, folder: Path, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **extra},
        timeout=280,
        check=False,
    )
