"""Run by torchrun on four processes: two BatchNorm groups, each of two processes, against one process with two groups.

Prints one line of JSON from rank 0: {device whose layers were taken: largest difference}; all tensors are on CPUs.
"""

import copy
import json
from collections.abc import Callable
from unittest.mock import patch

import device_operators  # noqa: F401
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import small_recipe
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkit.distributed import collectives
from sslkit.distributed.collectives import mean_over_processes, rank
from sslkit.engine.gradient_cache import GlobalBatch, whole_batch_step
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.parts.batchnorm import synchronise_in_groups

N = 16


def train(accelerator: Accelerator, method: Method, part: Callable[[Tensor], Tensor], device: str = "") -> list[Tensor]:
    """Losses and the whole state after three steps. ``device`` chooses the BatchNorm layers; empty on one process."""
    wrap = bool(device)
    if wrap:
        across = method.groups_across_processes
        synchronise_in_groups(method, torch.device(device), method.batch_norm_groups(), across_processes=across)
    wrapped: nn.Module = DistributedDataParallel(method, broadcast_buffers=False) if wrap else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(N, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
        batch = GlobalBatch(
            [part(view) for view in views], BatchInfo(part(torch.arange(N))), Progress(0, 1), None, lambda view: view
        )
        loss = whole_batch_step(accelerator, wrapped, batch).loss
        method.before_update(Progress(step, 10))
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(step + 1, 10))
        losses.append(mean_over_processes(loss) if wrap else loss.detach())
    return [torch.stack(losses), *(value for value in method.state_dict().values() if value.is_floating_point())]


def main() -> None:
    dist.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    method = build_method(small_recipe("swav", "test_resnet", method={"bn_groups": 2})).double()
    with patch.object(collectives.dist, "is_initialized", lambda: False):
        expected = train(accelerator, copy.deepcopy(method), lambda rows: rows)
    own = slice(rank() * N // 4, (rank() + 1) * N // 4)
    results = {}
    for device in ("cpu", "cuda"):
        found = train(accelerator, copy.deepcopy(method), lambda rows: rows[own].clone(), device)
        worst = torch.tensor(max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        results[device] = float(worst)
    if rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


main()
