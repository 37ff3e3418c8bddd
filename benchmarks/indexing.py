"""Time and memory to index a folder of as many files as ImageNet, also with data workers.

    python benchmarks/indexing.py [--files 1281167] [--tree FOLDER]

The tree of small files in a thousand folders is created first if it does not exist (some minutes). Each measurement
runs in a separate process. Memory is the proportional set size (Linux), in which shared pages count once in total.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import machine, table
from torch.utils.data import DataLoader, Dataset

from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source

CLASSES = 1000
TINY = bytes(40)


def make_tree(root: Path, files: int) -> None:
    """Create files with names like ImageNet's."""
    for number in range(CLASSES):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for image in range(number, files, CLASSES):
            (folder / f"n{number:08d}_{image:07d}.JPEG").write_bytes(TINY)


def memory_mib(pid: int | str = "self") -> float:
    """Proportional set size of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 1024


def list_paths(root: Path) -> dict[str, float]:
    """Time and memory of a Python list of all paths."""
    before, started = memory_mib(), time.perf_counter()
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return {"seconds": time.perf_counter() - started, "mib": memory_mib() - before, "files": len(paths)}


class Names(Dataset[int]):
    """Read an image's bytes and return almost nothing."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> int:
        return len(self.source.encoded(position)[0])


def index(root: Path, workers: int) -> dict[str, float]:
    """Time and memory of sslkit's source, with data workers that have each read from it."""
    before, started = memory_mib(), time.perf_counter()
    source = open_source(DataConfig(path=str(root)))
    seconds = time.perf_counter() - started
    taken = memory_mib() - before
    found = {"seconds": seconds, "mib": taken, "files": len(source)}
    if workers:
        spread = [position * len(source) // 4096 for position in range(4096)]
        loader = DataLoader(Names(source), 64, sampler=spread, num_workers=workers)
        batches = iter(loader)
        for _ in range(48):
            next(batches)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        found["all"] = memory_mib() + sum(map(memory_mib, children)) - before
        list(batches)
    return found


def in_a_process(*words: str) -> dict[str, float]:
    """Run a measurement in a separate process and parse its output."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_281_167)
    parser.add_argument("--tree", default="")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2, 4, 8])
    parser.add_argument("--measure", default="")
    words = parser.parse_args()
    tree = Path(words.tree or Path(tempfile.gettempdir()) / f"tree-of-{words.files}")
    if words.measure:
        print(json.dumps(list_paths(tree) if words.measure == "paths" else index(tree, int(words.measure))))
        return
    if not tree.is_dir():
        make_tree(tree, words.files)
    print(machine("datasets", "pyarrow"))
    here = ["--tree", str(tree)]
    paths = in_a_process(*here, "--measure", "paths")
    rows = [["a Python list of paths", f"{paths['seconds']:.1f}", f"{paths['mib']:.0f}", ""]]
    for workers in words.workers:
        found = in_a_process(*here, "--measure", str(workers))
        own = f"{found['all']:.0f}" if workers else ""
        rows.append([f"sslkit, {workers} workers", f"{found['seconds']:.1f}", f"{found['mib']:.0f}", own])
        assert found["files"] == paths["files"]
    print(table([f"{paths['files']:.0f} files", "seconds to list", "MiB of the list", "MiB with all workers"], rows))


if __name__ == "__main__":
    main()
