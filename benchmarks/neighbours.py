"""Exact nearest neighbours: sslkit against faiss's flat index and scikit-learn's brute force.

    python benchmarks/neighbours.py [--bank 100000] [--queries 10000] [--width 768] [--k 20] [--threads 2]

All look for the same neighbours by inner product of unit vectors; the share that agrees is printed. faiss is left out
where it is not installed. Read the ratios: times are taken in turn.
"""

import argparse
from importlib import import_module
from importlib.util import find_spec

import torch
from side_by_side import Work, in_turn, machine, ratios, table
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.evaluate.knn import nearest


def contenders(bank: Tensor, queries: Tensor, k: int) -> dict[str, Work]:
    """By name, a function that returns the neighbours (Q, k)."""
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
    print(table(["what", "time over sslkit's", "quartiles", "best", "same neighbours"], rows))


if __name__ == "__main__":
    main()
