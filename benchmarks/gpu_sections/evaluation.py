"""kNN, features and probes on the device and on the CPU."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gpu_sections.common import Plan, Row, largest_difference, wait
from sslkit.evaluate.features.devices import feature_precision
from sslkit.evaluate.probes.exact_search import nearest
from sslkit.evaluate.probes.linear import fit_logistic

K = 20


def run(plan: Plan) -> list[Row]:
    """One row a computation."""
    rows, queries, width = (2_000, 200, 32) if plan.toy else (200_000, 10_000, 768)
    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(rows, width, generator=generator))
    asked = normalize(torch.randn(queries, width, generator=generator))
    what = f"kNN, {queries} queries of {rows} x {width}"
    return [*search_rows(plan, what, bank, asked), *feature_rows(plan), *logistic_rows(plan, bank, generator)]


def search_rows(plan: Plan, what: str, bank: Tensor, asked: Tensor) -> list[Row]:
    """kNN on the device, on the CPU for a tenth of the queries, and by faiss on the GPU where it is installed."""
    few = asked[: max(len(asked) // 10, 1)]
    expected, on_cpu = seconds(torch.device("cpu"), lambda: nearest(few, bank, K)[1])
    on_cpu *= len(asked) / len(few)
    rows: list[Row] = [{"what": what, "with": "sslkit, CPU", "seconds": on_cpu}]
    if plan.device.type == "cuda":
        there, asked_there = bank.to(plan.device), asked.to(plan.device)
        nearest(asked_there, there, K)
        found, spent = seconds(plan.device, lambda: nearest(asked_there, there, K)[1])
        same = float((found[: len(few)].cpu() == expected).float().mean())
        rows.append({"what": what, "with": "sslkit, GPU", "seconds": spent, "times faster": on_cpu / spent})
        rows[-1] |= {"same neighbours": same, "right": same > 0.999}
        if find_spec("faiss"):
            rows += faiss_rows(what, bank, asked, on_cpu)
    return rows


def feature_rows(plan: Plan) -> list[Row]:
    """Features of pixels that are on the device, in float32 and as an evaluation extracts them."""
    count, batch, name = (64, 32, "test_resnet") if plan.toy else (4096, 256, "resnet50")
    module = timm.create_model(name, num_classes=0).eval().to(plan.device, memory_format=torch.channels_last)
    pixels = torch.rand(batch, 3, 224, 224, device=plan.device).to(memory_format=torch.channels_last)
    rows: list[Row] = []
    found = {}
    for kind, precision in (("float32", nullcontext()), ("as in an evaluation", feature_precision(plan.device))):
        with torch.no_grad(), precision:
            module(pixels)
            found[kind], spent = seconds(plan.device, lambda: [module(pixels) for _ in range(count // batch)][-1])
        rows.append({"what": f"{name}, features of {count} images", "with": kind, "seconds": spent})
    rows[1]["times faster"] = rows[0]["seconds"] / rows[1]["seconds"]
    rows[1]["right"] = largest_difference(*found.values()) < 0.05
    return rows


def logistic_rows(plan: Plan, bank: Tensor, generator: torch.Generator) -> list[Row]:
    """A logistic regression on a part of the bank, with classes that are the nearest of random directions."""
    features = bank[: len(bank) // 20]
    directions = torch.randn(features.shape[1], 10 if plan.toy else 100, generator=generator)
    labels = (features @ directions).argmax(dim=1)
    rows: list[Row] = []
    for device in dict.fromkeys((torch.device("cpu"), plan.device)):
        there = features.to(device), labels.to(device)
        _, spent = seconds(device, partial(fit_logistic, *there, directions.shape[1], 1.0))
        rows.append({"what": f"logistic regression, {len(features)} rows", "with": device.type, "seconds": spent})
        rows[-1]["times faster"] = rows[0]["seconds"] / spent
    return rows


def faiss_rows(what: str, bank: Tensor, asked: Tensor, on_cpu: float) -> list[Row]:
    """faiss's flat index on the GPU, if it was built for GPUs."""
    faiss = import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        return []
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), bank.shape[1])
    index.add(bank.numpy())
    index.search(asked[:10].numpy(), K)
    _, spent = seconds(torch.device("cuda"), lambda: index.search(asked.numpy(), K))
    return [{"what": what, "with": "faiss, GPU", "seconds": spent, "times faster": on_cpu / spent}]


def seconds(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its time."""
    wait(device)
    started = time.perf_counter()
    found = work()
    wait(device)
    return found, time.perf_counter() - started
