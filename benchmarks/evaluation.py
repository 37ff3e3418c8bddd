"""Cost of evaluation: kNN memory at ImageNet size, kNN compared with scikit-learn, and a sweep compared with one head,
on cached features and including feature extraction.

    python benchmarks/evaluation.py [--parts cached pictures sklearn memory] [--images 1281167] [--queries 50000]

Prints one line for each. Compared times are measured alternately in one process; use their ratio.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from side_by_side import machine
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.features.store import FeatureStore
from sslkit.evaluate.probes.exact_search import nearest
from sslkit.evaluate.probes.knn import KnnProtocol, predict
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep

HEADS = len(SweepProtocol().lrs) * len(SweepProtocol().weight_decays) * len(SweepProtocol().norms)


def alternately(*works: Callable[[], object], times: int = 3) -> list[float]:
    """Median seconds of each function, run alternately."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(times):
        for work, spent in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return [median(spent) for spent in seconds]


def knn_memory(images: int, queries: int, width: int, folder: Path) -> str:
    """Peak memory of kNN with a bank on disk."""

    def rows(part: range) -> Tensor:
        return torch.randn(len(part), width, generator=torch.Generator().manual_seed(part.start))

    bank = FeatureStore(folder).load_or_extract(["bank"], images, lambda _keys, span: [rows(span)])[0]
    labels = torch.arange(images) % 1000
    before = peak_megabytes()
    start = time.perf_counter()
    predict(rows(range(queries)), bank, labels, 1000, KnnProtocol.from_name("dino"))
    minutes = (time.perf_counter() - start) / 60
    return (
        f"kNN, {queries} queries, {images} x {width} bank of {4 * images * width / 2**20:.0f} MiB on disk, k to 200: "
        f"{peak_megabytes() - before:.0f} MiB more than before (mapped pages of the bank included), {minutes:.1f} min"
    )


def peak_megabytes() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def knn_against_sklearn() -> str:
    """Time for 20 neighbours of 2 000 queries in a bank of 50 000 x 256."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (normalize(torch.randn(rows, 256, generator=generator)) for rows in (50_000, 2_000))
    brute = NearestNeighbors(n_neighbors=20, algorithm="brute", metric="cosine")
    ours, theirs = alternately(
        lambda: nearest(queries, bank, 20), lambda: brute.fit(bank.numpy()).kneighbors(queries.numpy())
    )
    return f"kNN, 2000 x 50000 x 256: scikit-learn's brute force takes {theirs / ours:.2f} times as long"


def sweep_on_cached_features(width: int, classes: int, rows: int, epochs: int) -> str:
    """Time of a sweep relative to one head, on cached features."""
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).relu()
    one, all_heads = alternately(*(partial(fit, features, labels, protocol) for protocol in protocols(epochs)))
    return (
        f"sweep on cached features, {rows} x {width}, {classes} classes, {epochs} epochs: one head {one:.2f} s, "
        f"{HEADS} heads {all_heads / one:.1f} times that"
    )


def sweep_from_pictures(name: str, side: int, images: int, class_counts: Sequence[int], epochs: int) -> Iterator[str]:
    """Time of a sweep relative to one head, both including feature extraction.

    If the images have fewer classes, labels are random. This does not affect the cost.
    """
    torch.manual_seed(0)
    shape = {"input_size": (3, side, side), "mean": (0.3,) * 3, "std": (0.35,) * 3, "crop_pct": 1.0}
    encoder = Encoder(timm.create_model(name, num_classes=0), {**shape, "interpolation": "bilinear"}, name, name)
    source = open_source(DataConfig(path="builtin:fashion_mnist")).subset(np.arange(images))
    (features,) = extract_readouts(encoder, source, encoder.transform(), [Readout()])
    for classes in class_counts:
        labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(1))
        extraction, one, all_heads = alternately(
            partial(extract_readouts, encoder, source, encoder.transform(), [Readout()]),
            *(partial(fit, features, labels, protocol) for protocol in protocols(epochs)),
        )
        yield (
            f"sweep from pictures, {images} of {name} at {side} pixels, {classes} classes, {epochs} epochs: extraction "
            f"{extraction:.1f} s, one head {one:.2f} s, {HEADS} heads {all_heads:.1f} s; pictures to scores "
            f"{(extraction + all_heads) / (extraction + one):.2f} times one head"
        )


def protocols(epochs: int) -> tuple[SweepProtocol, SweepProtocol]:
    """Protocols of one head and of the whole grid."""
    return SweepProtocol((0.1,), (0.0,), (False,), epochs), SweepProtocol(epochs=epochs)


def fit(features: Tensor, labels: Tensor, protocol: SweepProtocol) -> object:
    """Run a sweep, scored on a hundred rows only, so that nearly all of the time is training."""
    return sweep({"out": features}, labels, {"out": features[:100]}, labels[:100], protocol)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["cached", "pictures", "sklearn", "memory"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="Which measurements to run.")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    print(machine("torch", "timm"), f"{torch.get_num_threads()} threads", flush=True)
    if "cached" in arguments.parts:
        for width, classes, rows, epochs in ((512, 10, 20_000, 5), (512, 100, 20_000, 2), (512, 1000, 10_000, 1)):
            print(sweep_on_cached_features(width, classes, rows, epochs), flush=True)
    if "pictures" in arguments.parts:
        for name, side, images in (("resnet18", 96, 1024), ("resnet50", 224, 128)):
            for line in sweep_from_pictures(name, side, images, (10, 100, 1000), epochs=50):
                print(line, flush=True)
    if "sklearn" in arguments.parts:
        print(knn_against_sklearn(), flush=True)
    if "memory" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            print(knn_memory(arguments.images, arguments.queries, arguments.width, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
