"""Run by torchrun on two processes: parts of sslkit against what one process computes on the whole batch.

Prints one line of JSON from rank 0: {check: largest difference}.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import device_operators  # noqa: F401
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import small_recipe
from golden.formulas import moco_v3_ctr
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkit.distributed import collectives
from sslkit.distributed.collectives import (
    average_later,
    exchange_rows,
    gather_rows,
    mean_over_processes,
    mean_with_due,
    rank,
    sum_with_gradient,
)
from sslkit.distributed.sharding import shard
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.setup import build_method
from sslkit.evaluate.features.encoder import fingerprint
from sslkit.methods import BatchInfo, Method, Progress, base, end_to_end, moco_v1, moco_v3, simclr
from sslkit.parts import losses
from sslkit.parts import memory_bank as bank
from sslkit.parts.batch_slices import encode_each, encode_in_slices
from sslkit.parts.batchnorm import GroupStatistics, synchronise_batch_norm, synchronise_in_groups
from sslkit.parts.losses import info_nce_in_batch

CPU = torch.device("cpu")
GPU = torch.device("cuda")  # chooses the layers; their operators are those of `device_operators`
N, SAMPLES = 16, 40
HALF = N // 2


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(rows: Tensor) -> Tensor:
    return rows[rank() * HALF : (rank() + 1) * HALF].clone()


def difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max())


def gathering() -> float:
    return difference(gather_rows(mine(whole(N, 3))), whole(N, 3))


def exchanging() -> float:
    """Equal to all-gather and index, for many permutations and dtypes, and undone by the inverse."""
    worst = 0.0
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(N)
        rows = whole(N, 3, 2, 2, seed=seed)
        moved = exchange_rows(mine(rows), order)
        worst = max(worst, difference(moved, mine(rows[torch.from_numpy(order)])))
        worst = max(worst, difference(exchange_rows(moved, np.argsort(order)), mine(rows)))
    return worst


def summing() -> float:
    values = mine(whole(N, 3)).requires_grad_()
    (sum_with_gradient(values.sum(dim=0)) ** 2).sum().backward()
    expected = whole(N, 3).requires_grad_()
    # each of two processes computes the same function of the sum, so gradients add up twice
    (expected.sum(dim=0) ** 2).sum().backward()
    assert values.grad is not None
    assert expected.grad is not None
    return difference(values.grad, 2 * mine(expected.grad))


def averaging() -> float:
    """What waits for the next mean is averaged with it, once."""
    values, waiting = whole(N, 3, seed=4), [whole(N, 2, 5, seed=5), whole(N, seed=6)]
    own = [mine(each).sum(dim=0) for each in waiting]
    average_later(own)
    means = [mean_with_due(mine(values).sum(dim=0)), *own]
    expected = [each.sum(dim=0) / 2 for each in (values, *waiting)]
    again = [mean_with_due(mine(values).sum(dim=0)), *own]
    return max(difference(mean, each) for found in (means, again) for mean, each in zip(found, expected, strict=True))


def batch_norm() -> float:
    """Forward, backward and running statistics of converted layers equal BatchNorm on the whole batch."""
    worst = 0.0
    torch.manual_seed(0)
    nets = [
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5, affine=False)), (N, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)), (N, 3, 5, 5)),
    ]
    for net, shape in nets:
        plain = net.double()
        ours = DistributedDataParallel(synchronise_batch_norm(copy.deepcopy(plain), CPU), broadcast_buffers=False)
        target = whole(*plain(whole(*shape)).shape, seed=5)
        ((plain(whole(*shape)) * target).sum() / N).backward()
        out = ours(mine(whole(*shape)))
        ((out * mine(target)).sum() / HALF).backward()
        for a, b in zip(ours.module.parameters(), plain.parameters(), strict=True):
            worst = max(worst, difference(a.grad, b.grad))
        assert ours.module.state_dict().keys() == plain.state_dict().keys()
        again = synchronise_batch_norm(copy.deepcopy(plain), CPU).eval()
        worst = max(worst, difference(again(whole(*shape)), plain.eval()(whole(*shape))))
    return worst


def running_statistics() -> float:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(5).double()
    ours = synchronise_batch_norm(copy.deepcopy(plain), CPU)
    plain(whole(N, 5))
    ours(mine(whole(N, 5)))
    return max(difference(ours.running_mean, plain.running_mean), difference(ours.running_var, plain.running_var))


def norms_of_gpus(views: int, groups: int, momentum: float | None) -> float:
    """The layers of GPUs, of groups with rows on both processes: outputs, gradients and buffers after three steps."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, momentum=momentum), nn.Conv2d(4, 2, 1)),
        *(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(2), nn.BatchNorm1d(2, momentum=momentum)),
        *(nn.Flatten(), nn.BatchNorm1d(18, affine=False, momentum=momentum)),
    ).double()
    ours = synchronise_batch_norm(copy.deepcopy(plain), GPU)
    worst = 0.0
    for step in range(3):
        batches = [whole(N, 3, 5, 5, seed=10 * step + view).requires_grad_() for view in range(views)]
        parts = [mine(batch.detach()).requires_grad_() for batch in batches]
        # The rows of a group are contiguous on each process.
        order = torch.arange(N).view(2, groups, -1).transpose(0, 1).flatten()
        with alone():
            expected = encode_in_slices(
                lambda part: encode_each(part, plain),
                [batch[order] for batch in batches],
                groups,
                statistics=GroupStatistics([plain], groups),
            )
        statistics = GroupStatistics([ours], 1, groups=groups, average=False)
        found = encode_in_slices(lambda part: encode_each(part, ours), parts, 1, statistics=statistics)
        expected = [each[order.argsort()] for each in expected]
        targets = [whole(*each.shape, seed=5 + view) for view, each in enumerate(expected)]
        sum((each * target).sum() for each, target in zip(expected, targets, strict=True)).backward()
        sum((each * mine(target)).sum() for each, target in zip(found, targets, strict=True)).backward()
        worst = max(worst, *(difference(a, mine(b)) for a, b in zip(found, expected, strict=True)))
        worst = max(worst, *(difference(a.grad, mine(b.grad)) for a, b in zip(parts, batches, strict=True)))
    for buffer, other in zip(ours.buffers(), plain.buffers(), strict=True):
        worst = max(worst, difference(buffer.double(), other.double()))
    for param, other in zip(ours.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(param.grad)
        worst = max(worst, difference(param.grad, other.grad))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    return worst


def in_batch_loss() -> float:
    """Mean of local losses, and averaged gradients, equal one process on the whole batch."""
    query, key = whole(N, 6, seed=1), whole(N, 6, seed=2)
    local = mine(query).requires_grad_()
    loss = 2 * 0.2 * info_nce_in_batch(local, gather_rows(mine(key)), 0.2, first_label=HALF * rank())[0]
    loss.backward()
    everyone = query.clone().requires_grad_()
    expected = moco_v3_ctr(everyone, key, 0.2)
    expected.backward()
    assert local.grad is not None
    assert everyone.grad is not None
    return max(
        difference(mean_over_processes(loss), expected.detach()), difference(local.grad / 2, mine(everyone.grad))
    )


@functools.cache
def accelerator() -> Accelerator:
    """Made once, while the process group can be seen."""
    return Accelerator(cpu=True)


def views_of(method: Method, step: int) -> list[Tensor]:
    sizes = (32, 32, 16, 16) if hasattr(method, "prototypes") else (32, 32)
    return [whole(N, 3, size, size, seed=10 * step + view) for view, size in enumerate(sizes)]


def train_five_steps(
    method: Method, part: Callable[[Tensor], Tensor], *, device: torch.device | None, micro: int
) -> list[Tensor]:
    """Losses of the global batch, final parameters and running statistics, of whole batches or a rank's part.

    ``device`` chooses the BatchNorm layers; None is one process.
    """
    torch.manual_seed(0)
    wrap = device is not None
    if device is not None:
        synchronise_in_groups(
            method, device, method.batch_norm_groups(), across_processes=method.groups_across_processes
        )
    wrapped: nn.Module = DistributedDataParallel(method, broadcast_buffers=False) if wrap else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for step in range(5):
        views = [part(view) for view in views_of(method, step)]
        ids = part(torch.from_numpy(np.random.default_rng(step).permutation(SAMPLES)[:N]))
        order = np.random.default_rng(step).permutation(N) if method.shuffle_keys else None
        batch = GlobalBatch(views, BatchInfo(ids), Progress(0, 1), order, lambda view: view)
        if micro:
            result = sliced_step(accelerator(), method, batch, micro, lambda _: None)
        else:
            result = whole_batch_step(accelerator(), wrapped, batch)
        method.before_update(Progress(step, 10))
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(step + 1, 10))
        losses.append(mean_over_processes(result.loss) if wrap else result.loss.detach())
    state = [value for value in method.state_dict().values() if value.is_floating_point()]
    return [torch.stack(losses), *state]


# Check: method, backbone, options, images of a slice on the two processes (0: no slices; the one never slices).
TRAININGS: dict[str, tuple[str, str, dict[str, object], int]] = {
    "v1_resnet": ("moco_v1", "test_resnet", {}, 0),
    "v2_resnet": ("moco_v2", "test_resnet", {}, 0),
    "v2_vit": ("moco_v2", "test_vit", {}, 0),
    "v2_symmetric": ("moco_v2", "test_resnet", {"symmetric": True}, 0),
    "v3_resnet": ("moco_v3", "test_resnet", {}, 0),
    "v3_vit": ("moco_v3", "test_vit", {}, 0),
    "simclr_resnet": ("simclr", "test_resnet", {}, 0),
    "simclr_vit": ("simclr", "test_vit", {}, 0),
    "byol_resnet": ("byol", "test_resnet", {}, 0),
    "v2_of_four_groups": ("moco_v2", "test_resnet", {"bn_groups": 4}, 0),
    "swav_of_four_groups": ("swav", "test_resnet", {"bn_groups": 4}, 0),
    "swav_resnet": ("swav", "test_resnet", {"queue_size": 16, "queue_start_epoch": 0.0}, 0),
    "instdisc_vit": ("instdisc", "test_vit", {}, 0),
    "softmax_vit": ("instdisc", "test_vit", {"loss": "softmax"}, 0),
    "memory_bank_vit": ("memory_bank", "test_vit", {}, 0),
    "end_to_end_resnet": ("end_to_end", "test_resnet", {"symmetric": True}, 0),
    "end_to_end_vit": ("end_to_end", "test_vit", {}, 0),
    "v2_in_slices": ("moco_v2", "test_resnet", {"bn_groups": 4}, 4),
    "v3_in_slices": ("moco_v3", "test_vit", {}, 2),
    "simclr_in_slices": ("simclr", "test_vit", {}, 1),
    "end_to_end_in_slices": ("end_to_end", "test_resnet", {"bn_groups": 4}, 4),
}


def method_trains_alike(
    name: str, model: str, options: dict[str, object], micro: int, device: torch.device = CPU
) -> float:
    torch.manual_seed(0)
    method = build_method(small_recipe(name, model, method=options), num_samples=SAMPLES).double()
    # One process first, without the group that the collectives would find.
    with alone():
        expected = train_five_steps(copy.deepcopy(method), lambda rows: rows, device=None, micro=0)
    found = train_five_steps(method, mine, device=device, micro=micro)
    return max(difference(a, b) for a, b in zip(found, expected, strict=True))


def mistake(module: object, name: str, wrong: object, training: str) -> float:
    """What the comparison sees when a classic mistake of distributed code is made on the two processes."""
    torch.manual_seed(0)
    method_name, model, options, _ = TRAININGS[training]
    method = build_method(small_recipe(method_name, model, method=options), num_samples=SAMPLES).double()
    with alone():
        expected = train_five_steps(copy.deepcopy(method), lambda rows: rows, device=None, micro=0)
    with patch.object(module, name, wrong):
        found = train_five_steps(method, mine, device=CPU, micro=0)
    return max(difference(a, b) for a, b in zip(found, expected, strict=True))


def encoder_in_parts() -> float:
    """Features of an encoder in parts that is called before its method is, as for a kNN that is owed; then a step."""
    torch.manual_seed(0)
    method = build_method(small_recipe("byol", "test_vit")).double()
    images = views_of(method, 0)[0]
    expected = method.backbone(images).detach()
    shard(method, method.backbones(), CPU)
    with torch.no_grad():
        found = method.backbone(images)
    before = fingerprint(method.backbone)
    batch = GlobalBatch(
        [mine(view) for view in views_of(method, 0)],
        BatchInfo(mine(torch.arange(N))),
        Progress(0, 1),
        None,
        lambda view: view,
    )
    whole_batch_step(accelerator(), method, batch)
    assert fingerprint(method.backbone) == before
    assert all(param.grad is not None for param in method.predictor.parameters())
    return difference(found, expected)


# Views, groups, momentum.
NORMS = ((1, 1, 0.1), (1, 1, None), (2, 1, 0.1), (3, 1, None), (1, 2, 0.35), (2, 4, 0.1), (1, 2, None))
ON_GPUS = ("v2_resnet", "v3_resnet", "simclr_resnet", "swav_of_four_groups", "v2_in_slices")


MISTAKES: dict[str, tuple[object, str, object, str]] = {
    "gather without gradient": (simclr, "gather_rows_with_gradient", gather_rows, "simclr_vit"),
    "keys gathered without gradient": (end_to_end, "gather_rows_with_gradient", gather_rows, "end_to_end_vit"),
    "labels without the rank's offset": (moco_v3, "rank", lambda: 0, "v3_vit"),
    "own keys queued only": (moco_v1, "gather_rows", lambda rows: rows.detach(), "v2_vit"),
    "codes of the local batch": (losses, "sum_over_processes", lambda values: values, "swav_resnet"),
    "shuffle inside the process": (base, "exchange_rows", lambda rows, _: rows, "v2_resnet"),
    "noise drawn per process": (bank, "rank", lambda: 0, "memory_bank_vit"),
}


@contextmanager
def alone() -> Iterator[None]:
    """Let the collectives see one process."""
    with patch.object(collectives.dist, "is_initialized", lambda: False):
        yield


def main() -> None:
    dist.init_process_group("gloo")
    accelerator()
    parts = (gathering, exchanging, summing, averaging, batch_norm, running_statistics, in_batch_loss, encoder_in_parts)
    checks: dict[str, Callable[[], float]] = {part.__name__: part for part in parts}
    checks |= {name: functools.partial(method_trains_alike, *training) for name, training in TRAININGS.items()}
    on_gpus = {f"{name} on GPUs": functools.partial(method_trains_alike, *TRAININGS[name], GPU) for name in ON_GPUS}
    checks |= {
        f"norms of {views} {groups} {m}": functools.partial(norms_of_gpus, views, groups, m)
        for views, groups, m in NORMS
    }
    checks |= on_gpus
    checks |= {f"mistake: {name}": functools.partial(mistake, *made) for name, made in MISTAKES.items()}
    found = {}
    for name, check in checks.items():
        worst = torch.tensor(check())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found[name] = float(worst)
    if rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.destroy_process_group()


main()
