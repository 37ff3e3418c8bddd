"""What evaluation costs: kNN's memory at ImageNet's size, kNN against scikit-learn, a sweep against one head.

    python benchmarks/evaluation.py [--images 1281167] [--queries 50000] [--width 128]

Prints one line for each. Times of two things are taken alternately in one process; read their ratio.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.evaluate.knn import KnnProtocol, nearest, predict_all
from sslkit.evaluate.store import FeatureStore
from sslkit.evaluate.sweep import SweepProtocol, sweep


def alternately(first: Callable[[], object], second: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Median seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for work, spent in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return median(seconds[0]), median(seconds[1])


def knn_memory(images: int, queries: int, width: int, folder: Path) -> str:
    """Peak memory of kNN against a bank on disk."""

    def rows(part: range) -> Tensor:
        return torch.randn(len(part), width, generator=torch.Generator().manual_seed(part.start))

    bank = FeatureStore(folder).features("bank", images, rows)
    labels = torch.arange(images) % 1000
    before = peak_megabytes()
    start = time.perf_counter()
    predict_all(rows(range(queries)), bank, labels, 1000, KnnProtocol.named("dino"))
    minutes = (time.perf_counter() - start) / 60
    return (
        f"kNN, {queries} queries, {images} x {width} bank of {4 * images * width / 2**20:.0f} MiB on disk, k to 200: "
        f"{peak_megabytes() - before:.0f} MiB more than before (mapped pages of the bank included), {minutes:.1f} min"
    )


def peak_megabytes() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def knn_against_sklearn() -> str:
    """Twenty neighbours of 2 000 queries among 50 000 of 256 numbers."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (normalize(torch.randn(rows, 256, generator=generator)) for rows in (50_000, 2_000))
    brute = NearestNeighbors(n_neighbors=20, algorithm="brute", metric="cosine")
    ours, theirs = alternately(
        lambda: nearest(queries, bank, 20), lambda: brute.fit(bank.numpy()).kneighbors(queries.numpy())
    )
    return f"kNN, 2000 x 50000 x 256: scikit-learn's brute force takes {theirs / ours:.2f} times as long"


def sweep_against_one_head() -> str:
    """32 heads against one on 10 000 features of 512 numbers, ten classes."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(rows, 512, generator=generator) for rows in (10_000, 2_000))
    labels, truth = torch.arange(10_000) % 10, torch.arange(2_000) % 10

    def run(protocol: SweepProtocol) -> Callable[[], object]:
        return lambda: sweep({"output": train}, labels, {"output": test}, truth, protocol)

    grid = SweepProtocol(epochs=10)
    one = SweepProtocol((0.1,), (0.0,), (False,), epochs=10)
    many_seconds, one_seconds = alternately(run(grid), run(one))
    heads = len(grid.lrs) * len(grid.weight_decays) * len(grid.norms)
    return f"sweep of {heads} heads, extraction aside: {many_seconds / one_seconds:.2f} times one head"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    print(sweep_against_one_head(), flush=True)
    print(knn_against_sklearn(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(knn_memory(arguments.images, arguments.queries, arguments.width, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
