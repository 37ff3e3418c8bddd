"""Run by torchrun on two processes: a method sharded in bf16 against a copy cast to bf16 by hand, and in float32.

Prints one line of JSON from rank 0: what was found for each method.
"""

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import small_recipe
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sslkit.distributed.collectives import rank
from sslkit.distributed.sharding import full_tensor, shard
from sslkit.engine.gradient_cache import GlobalBatch, whole_batch_step
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.parts.batchnorm import batch_norms

CPU, HALF = torch.device("cpu"), 8
LOW = torch.bfloat16


def step(method: Method, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process, and the mean gradients over both."""
    generator = torch.Generator().manual_seed(rank())
    views = [torch.randn(HALF, 3, 32, 32, generator=generator).to(dtype) for _ in range(2)]
    batch = GlobalBatch(views, BatchInfo(torch.arange(HALF)), Progress(0, 1), None, lambda view: view)
    torch.manual_seed(2)
    loss = whole_batch_step(Accelerator(cpu=True), method, batch).loss.detach()
    grads = {name: param.grad for name, param in method.named_parameters() if param.grad is not None}
    whole: dict[str, Tensor] = {}
    for name, grad in grads.items():
        whole[name] = full_tensor(grad).float().clone()
        if not isinstance(grad, DTensor):
            dist.all_reduce(whole[name])
            whole[name] /= 2
    return loss, whole


def cast_by_hand(method: Method) -> Method:
    norms = {id(param) for norm in batch_norms(method) for param in norm.parameters()}
    for param in method.parameters():
        if id(param) not in norms:
            param.data = param.data.to(LOW)
    return method


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Distance of all gradients together, relative to their norm."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected))
    return float((a - b).norm() / b.norm())


def record(method: Method, seen: dict[str, set[str]]) -> None:
    """Note with which dtypes the layers compute, and whether under autocast."""

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        kind = type(layer).__name__.removeprefix("FSDP")
        seen.setdefault(kind, set()).update({str(param.dtype) for param in layer.parameters(recurse=False)})
        seen.setdefault(f"output of {kind}", set()).add(str(output.dtype))
        seen.setdefault("autocast", set()).add(str(torch.is_autocast_enabled("cpu")))

    for layer in method.modules():
        if layer is not method and list(layer.parameters(recurse=False)):
            layer.register_forward_hook(note)


def compare(name: str, model: str) -> dict[str, Any]:
    torch.manual_seed(0)
    method = build_method(small_recipe(name, model))
    method.synchronise_batch_norm(CPU)
    exact_loss, exact = step(copy.deepcopy(method), torch.float32)
    hand_loss, by_hand = step(cast_by_hand(copy.deepcopy(method)), LOW)
    seen: dict[str, set[str]] = {}
    record(method, seen)
    shard(method, method.backbones(), CPU, compute_dtype=LOW, full_precision=batch_norms(method))
    loss, found = step(method, torch.float32)
    return {
        "loss dtype": str(loss.dtype),
        "loss against hand": abs(float(loss - hand_loss)),
        "loss against float32": abs(float(loss - exact_loss)),
        "gradient against hand": relative(found, by_hand),
        "gradient against float32": relative(found, exact),
        "hand against float32": relative(by_hand, exact),
        "shards": sorted({str(param.dtype) for param in method.parameters()}),
        "gradients": sorted({str(param.grad.dtype) for param in method.parameters() if param.grad is not None}),
        "all sharded": all(isinstance(param, DTensor) for param in method.parameters()),
        "seen": {kind: sorted(dtypes) for kind, dtypes in seen.items()},
    }


def main() -> None:
    dist.init_process_group("gloo")
    pairs = (("moco_v3", "test_vit"), ("byol", "test_vit"), ("simclr", "test_resnet"))
    found = {f"{name} {model}": compare(name, model) for name, model in pairs}
    if rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.destroy_process_group()


main()
