"""One rank under NCCL, and two ranks under gloo on the same GPU against one process."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from gpu_sections.common import Plan, Row

RUN = """
import sys
sys.path.insert(0, {benchmarks!r})
import sslkit
from gpu_sections.common import small_recipe
tables = {{"train": {{"max_steps": 3}}, "backbone": {{"name": "test_vit"}}}}
sslkit.train(small_recipe("moco_v2", **tables), {folder!r})
"""


def run(plan: Plan) -> list[Row]:
    """One row a group of processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = trained(folder / "alone", 1, {})
        rows = []
        if plan.device.type == "cuda":
            nccl = trained(folder / "nccl", 1, {"ACCELERATE_USE_CPU": "false"}, launcher=True)
            rows.append(compare("NCCL, 1 rank", alone, nccl))
        two = trained(folder / "two", 2, {"ACCELERATE_USE_CPU": "true"}, launcher=True)
        rows.append(compare("gloo, 2 ranks on the CPU", alone, two))
    return rows


def trained(
    folder: Path, count: int, environment: dict[str, str], *, launcher: bool = False
) -> dict[str, torch.Tensor]:
    """The weights after three steps in processes of their own."""
    program = folder.with_suffix(".py")
    program.write_text(RUN.format(benchmarks=str(Path(__file__).parents[1]), folder=str(folder)))
    words = [sys.executable]
    if launcher:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, str(program)], capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")


def compare(what: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Row:
    """How far the weights are apart."""
    off = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
    return {"processes": what, "right": off < 1e-3, "largest difference": off}
