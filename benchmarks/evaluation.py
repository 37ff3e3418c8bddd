"""What evaluation costs: kNN's memory at ImageNet's size, kNN against scikit-learn, a sweep against one head.

    python benchmarks/evaluation.py [--parts sweep sklearn memory] [--images 1281167] [--queries 50000] [--width 128]

Prints one line for each. Times of two things are taken alternately in one process; read their ratio.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.data.source import DataConfig, open_source
from sslkit.evaluate.features import Encoder
from sslkit.evaluate.knn import KnnProtocol, nearest, predict_all
from sslkit.evaluate.reading import Reading, read_features
from sslkit.evaluate.store import FeatureStore
from sslkit.evaluate.sweep import SweepProtocol, sweep


def alternately(*works: Callable[[], object], times: int = 3) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(times):
        for work, spent in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return [median(spent) for spent in seconds]


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


def sweep_against_one_head(name: str, side: int, images: int, readings: Sequence[str]) -> str:
    """A sweep from the pictures on against one head from the pictures on: nothing is cached, one pass for all."""
    torch.manual_seed(0)
    shape = {"input_size": (3, side, side), "mean": (0.3,) * 3, "std": (0.35,) * 3, "crop_pct": 1.0}
    module = timm.create_model(name, num_classes=0)
    encoder = Encoder(module, {**shape, "interpolation": "bilinear"}, name, name)
    sources = [open_source(DataConfig(path="builtin:fashion_mnist", split=split)) for split in ("train", "test")]
    sources = [source.subset(np.arange(rows)) for source, rows in zip(sources, (images, images // 5), strict=True)]
    classes = {label: number for number, label in enumerate(sources[0].class_names())}
    labels = [torch.tensor([classes[label] for label in source.labels()]) for source in sources]

    def run(protocol: SweepProtocol, words: Sequence[str]) -> Callable[[], object]:
        def from_scratch() -> object:
            named = [Reading.named(word) for word in words]
            sides = [read_features(encoder, source, encoder.transform(), named) for source in sources]
            train, test = (dict(zip(words, side, strict=True)) for side in sides)
            return sweep(train, labels[0], test, labels[1], protocol)

        return from_scratch

    grid = SweepProtocol()
    one = SweepProtocol((0.1,), (0.0,), (False,))
    heads = len(grid.lrs) * len(grid.weight_decays) * len(grid.norms)
    seconds = alternately(run(one, ["out"]), run(grid, ["out"]), run(grid, readings))
    return (
        f"{name} at {side} pixels, {images} + {images // 5} images, {grid.epochs} epochs, pictures to score: "
        f"one head {seconds[0]:.1f} s; {heads} heads {seconds[1] / seconds[0]:.2f} times that; "
        f"{heads * len(readings)} heads over {', '.join(readings)} {seconds[2] / seconds[0]:.2f} times"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["sweep", "sklearn", "memory"], help="Which of the three.")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    if "sweep" in arguments.parts:
        print(sweep_against_one_head("resnet18", 96, 3000, ["out", "-2", "-3"]), flush=True)
        print(sweep_against_one_head("test_mambaout", 28, 3000, ["out", "-2", "-3"]), flush=True)
    if "sklearn" in arguments.parts:
        print(knn_against_sklearn(), flush=True)
    if "memory" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            print(knn_memory(arguments.images, arguments.queries, arguments.width, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
