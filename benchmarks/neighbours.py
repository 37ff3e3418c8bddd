"""Exact nearest neighbours: sslkit compared with faiss's flat index and scikit-learn's brute force.

    python benchmarks/neighbours.py [--bank 100000] [--queries 10000] [--width 768] [--k 20] [--threads 2]

All search by inner product of unit vectors. The output includes the share of equal neighbours and the share of queries
to which lightly's kNN assigns the same class. faiss and lightly are skipped if they are not installed. Times are
measured alternately; use the ratios.
"""

import argparse
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from side_by_side import Work, in_turn, machine, ratios, table
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.evaluate.probes.exact_search import nearest
from sslkit.evaluate.probes.knn import KnnProtocol, predict

CLASSES = 100


def contenders(bank: Tensor, queries: Tensor, k: int) -> dict[str, Work]:
    """Functions that return the neighbours (Q, k), by name."""
    brute = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine")
    found: dict[str, Work] = {"sslkit": lambda: nearest(queries, bank, k)[1].numpy()}
    if find_spec("faiss"):
        index = import_module("faiss").IndexFlatIP(bank.shape[1])

        def flat() -> object:
            index.reset()
            index.add(bank.numpy())
            return index.search(queries.numpy(), k)[1]

        found["faiss, flat"] = flat
    found["scikit-learn, brute force"] = lambda: brute.fit(bank.numpy()).kneighbors(
        queries.numpy(), return_distance=False
    )
    return found


def lightlys_predict() -> Any:
    """lightly's ``knn_predict``, loaded from its file because the package needs more; None without lightly."""
    package = find_spec("lightly")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "utils" / "benchmarking" / "knn.py"
    spec = spec_from_file_location("lightly_knn", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.knn_predict


def same_classes(knn_predict: Any, bank: Tensor, queries: Tensor, k: int) -> float:
    """Share of queries with the same class from both kNNs. Labels are the nearest of some random directions."""
    directions = torch.randn(bank.shape[1], CLASSES, generator=torch.Generator().manual_seed(1))
    labels = (bank @ directions).argmax(dim=1)
    ours = predict(queries, bank, labels, CLASSES, [KnnProtocol(k, 0.07)])[0]
    chunks = [knn_predict(part, bank.T, labels, CLASSES, k, 0.07)[:, 0] for part in queries.split(256)]
    return float((torch.cat(chunks) == ours).float().mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("bank", 100_000), ("queries", 10_000), ("width", 768), ("k", 20), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if find_spec("faiss"):
        import_module("faiss").omp_set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        normalize(torch.randn(rows, arguments.width, generator=generator))
        for rows in (arguments.bank, arguments.queries)
    )
    print(machine("torch", "faiss-cpu", "scikit-learn"), f"{arguments.threads} threads")
    works = contenders(bank, queries, arguments.k)
    reference = works["sslkit"]()
    agree = {name: float((work() == reference).mean()) for name, work in works.items()}
    seconds = in_turn(works, arguments.rounds, warm_up=0)
    rows = [
        [name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{min(seconds[name]):.1f} s", f"{agree[name]:.4%}"]
        for name, (median, low, high) in ratios(seconds, "sslkit").items()
    ]
    if knn_predict := lightlys_predict():
        share = same_classes(knn_predict, bank, queries, arguments.k)
        print(f"lightly's kNN gives {share:.4%} of the queries the same class")
    print(table(["what", "time over sslkit's", "quartiles", "best", "same neighbours"], rows))


if __name__ == "__main__":
    main()
