"""Parts of a step compared with their limits: teacher update with a copy, InfoNCE with its matrix products.

    python benchmarks/pieces.py [--rounds 15] [--device cuda]

An update reads two numbers and writes one per parameter; the copy transfers as many bytes. InfoNCE with a queue of K
keys needs one matrix product for the logits and one for the gradient. "Plain" is the official code: all logits in one
matrix and PyTorch's cross-entropy. Times are measured alternately, peak memory in separate processes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from side_by_side import in_turn, machine, ratios, table
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslkit.parts.info_nce import info_nce_in_pieces
from sslkit.parts.momentum_teacher import MomentumTeacher

K, DIM, TEMPERATURE = 65_536, 128, 0.2
MOMENTUM = 0.99


def settled(work: Callable[[], object], device: str) -> Callable[[], object]:
    """The same function, followed by a device synchronisation."""
    if device == "cpu":
        return work

    def call() -> None:
        work()
        torch.accelerator.synchronize()

    return call


def teacher_rows(models: list[str], rounds: int, device: str) -> list[list[str]]:
    """Bandwidth of a teacher update relative to a copy."""
    rows = []
    for name in models:
        student = timm.create_model(name, num_classes=0).to(device)
        teacher = MomentumTeacher(student)
        count = sum(param.numel() for param in student.parameters())
        source = torch.randn(count * 3 // 2, device=device)
        target = torch.empty_like(source)
        works = {
            "move": settled(lambda student=student, teacher=teacher: teacher.update(student, MOMENTUM), device),
            "copy": settled(lambda source=source, target=target: target.copy_(source), device),
        }
        times = in_turn(works, rounds, warm_up=2)
        found = ratios({"copy": times["copy"], "move": times["move"]}, "move")["copy"]
        rows.append([f"teacher's move, {name}, {count / 1e6:.0f} M", *(f"{number:.2f}" for number in found)])
    return rows


def batch_of(size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, their keys and the queue."""
    torch.manual_seed(0)
    query, key = (normalize(torch.randn(size, DIM, device=device), dim=1) for _ in range(2))
    return query.requires_grad_(), key, normalize(torch.randn(K, DIM, device=device), dim=1)


def ours(query: Tensor, key: Tensor, keys: Tensor) -> None:
    """Loss and gradient in sslkit."""
    info_nce_in_pieces(query, key, keys, TEMPERATURE)[0].backward()


def plain(query: Tensor, key: Tensor, keys: Tensor) -> None:
    """Loss and gradient in the official code."""
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ keys.T], dim=1) / TEMPERATURE
    cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device)).backward()


def bare(query: Tensor, key: Tensor, keys: Tensor) -> None:
    """The two matrix products alone."""
    with torch.no_grad():
        logits = query @ keys.T
        torch.mm(logits, keys)


WORKS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"sslkit": ours, "plain": plain, "bare products": bare}


def contrast_rows(rounds: int, size: int, device: str) -> list[list[str]]:
    """Time relative to the bare products, and memory beyond the inputs."""
    inputs = batch_of(size, device)
    works = {name: settled(lambda work=work: work(*inputs), device) for name, work in WORKS.items()}
    found = ratios(in_turn(works, rounds, warm_up=2), "bare products")
    return [
        [name, str(size), *(f"{number:.2f}" for number in found[name]), f"{peak_mib(name, size, device):.0f}"]
        for name in WORKS
    ]


def peak_mib(name: str, size: int, device: str) -> float:
    """Peak memory of one call in a separate process."""
    words = [sys.executable, __file__, "--peak", name, "--batch", str(size), "--device", device]
    return float(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def print_peak(name: str, size: int, device: str) -> None:
    """Print the memory of one call beyond its inputs, after a small warm-up call."""
    inputs = batch_of(size, device)
    query, key, keys = inputs
    WORKS[name](query[:2].detach().requires_grad_(), key[:2], keys[:512])
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before = resident_peak_mib()
        WORKS[name](*inputs)
        print(resident_peak_mib() - before)
        return
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    WORKS[name](*inputs)
    print((torch.cuda.max_memory_allocated() - held) / 2**20)


def resident_peak_mib() -> float:
    """Peak memory of this process since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", default=["vit_base_patch16_224", "vit_large_patch16_224"])
    parser.add_argument("--peak", default="")
    words = parser.parse_args()
    if words.peak:
        print_peak(words.peak, words.batch, words.device)
        return
    print(machine("torch"), words.device)
    rows = teacher_rows(words.models, words.rounds, words.device)
    print(table(["what", "share of a copy's bandwidth", "lower quartile", "upper quartile"], rows))
    print(f"\nInfoNCE, K = {K}, forward and backward\n")
    head = ["what", "batch", "times the bare products", "lower quartile", "upper quartile", "peak MiB beyond inputs"]
    print(table(head, contrast_rows(words.rounds, words.batch, words.device)))


if __name__ == "__main__":
    main()
