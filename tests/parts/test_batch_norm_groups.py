"""Running statistics of a batch in groups: one update a step, by the mean over the groups' statistics."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_recipe
from torch import Tensor, nn

from sslkit.engine.gradient_cache import GlobalBatch, sliced_step
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method
from sslkit.parts.batchnorm import GlobalBatchNorm, GroupStatistics
from sslkit.parts.schedules import Progress

BATCH, STEPS = 12, 3


def views_of(step: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [3 + torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]


def build(name: str, /, **tables: dict[str, object]) -> Method:
    torch.manual_seed(0)
    recipe = small_recipe(name, "test_resnet", train={"batch_size": BATCH, **tables.pop("train", {})}, **tables)
    return build_method(recipe, num_samples=20).double().train()


def of_virtual_gpus(net: nn.Module, calls: list[list[Tensor]], groups: int) -> dict[str, Tensor]:
    """Buffers of ``groups`` copies of a network, averaged; each step's calls get one share of their rows each."""
    gpus = [copy.deepcopy(net) for _ in range(groups)]
    with torch.no_grad():
        for step in calls:
            for rows in step:
                for gpu, share in zip(gpus, rows.chunk(groups), strict=True):
                    gpu(share)
    buffers = [dict(gpu.named_buffers()) for gpu in gpus]
    return {name: sum(each[name].double() for each in buffers) / groups for name in buffers[0]}


def assert_equal(net: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_student_and_teacher_of_moco(groups: int, symmetric: bool) -> None:
    method = build("moco_v2", method={"bn_groups": groups, "symmetric": symmetric})
    seen = (0, 1) if symmetric else (0,)
    student, teacher = copy.deepcopy(method.backbone), copy.deepcopy(method.teacher_backbone)
    steps = [views_of(step) for step in range(STEPS)]
    orders = [np.random.default_rng(step).permutation(BATCH) for step in range(STEPS)]
    for views, order in zip(steps, orders, strict=True):
        method(views, BatchInfo(torch.arange(BATCH)), Progress(0, 1), order).loss.backward()
    assert_equal(method.backbone, of_virtual_gpus(student, [[views[i] for i in seen] for views in steps], groups))
    keys = [
        [views[i][torch.from_numpy(order)] for i in method.teacher_views]
        for views, order in zip(steps, orders, strict=True)
    ]
    assert_equal(method.teacher_backbone, of_virtual_gpus(teacher, keys, groups))


def test_eight_groups_move_the_mean_by_a_tenth_of_the_way() -> None:
    """The issue's figure: 0.1 of the batch's mean after one step, not 1 - 0.9 ** 8 = 0.57."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    rows = 5 + torch.randn(16, 4, dtype=torch.float64)
    statistics = GroupStatistics([norm], 8)
    for part in rows.chunk(8):
        statistics.start_slice()
        norm(part)
        statistics.end_slice()
    statistics.finish()
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(dim=0), rtol=1e-12, atol=1e-12)
    within = torch.stack([part.var(dim=0, unbiased=True) for part in rows.chunk(8)]).mean(dim=0)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * within, rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.full
@pytest.mark.parametrize("name", ["moco_v3", "byol", "simclr", "swav", "instdisc", "memory_bank", "end_to_end"])
def test_slices_of_a_micro_batch(name: str) -> None:
    """Three slices are three virtual GPUs; the second pass, with a graph, leaves no trace."""
    method = build(name, train={"micro_batch": 4}, method={"bn_groups": 3} if name == "end_to_end" else {})
    method.shuffle_keys = False
    backbone = copy.deepcopy(method.backbone)
    steps = [views_of(step, 4 if name == "swav" else 2) for step in range(STEPS)]
    accelerator = Accelerator(cpu=True)
    calls = []
    for views in steps:
        batch = GlobalBatch(views, BatchInfo(torch.arange(BATCH)), Progress(0, 1), None, lambda view: view)
        sliced_step(accelerator, method, batch, 4, lambda _: None)
        if name in ("swav", "simclr"):  # all views in one pass: each virtual GPU has its share of each
            calls.append([torch.cat([view.chunk(3)[gpu] for gpu in range(3) for view in views])])
        else:
            calls.append(views[:1] if name in ("instdisc", "memory_bank") else views)
    assert_equal(method.backbone, of_virtual_gpus(backbone, calls, 3))
    if hasattr(method, "teacher_backbone"):
        assert_equal(method.teacher_backbone.module, of_virtual_gpus(backbone, steps, 3))


def test_swavs_projector_is_grouped_too() -> None:
    """The official SyncBN groups hold the head's BatchNorm as well."""
    method = build("swav", method={"bn_groups": 3})
    projector = copy.deepcopy(method.projector)
    seen = []
    method.projector.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    method(views_of(0, 4), BatchInfo(torch.arange(BATCH)), Progress(0, 1)).loss.backward()
    assert [len(rows) for rows in seen] == [BATCH // 3 * 4] * 3
    assert_equal(method.projector, of_virtual_gpus(projector, [[torch.cat(seen)]], 3))
    one = build("swav", method={"bn_groups": 1})
    one.projector.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    one(views_of(0, 4), BatchInfo(torch.arange(BATCH)), Progress(0, 1))
    assert len(seen[-1]) == BATCH * 4


def test_frozen_statistics_stay() -> None:
    method = build("moco_v2", method={"bn_groups": 3})
    method.backbone.eval()
    before = {name: buffer.clone() for name, buffer in method.backbone.named_buffers()}
    method(views_of(0), BatchInfo(torch.arange(BATCH)), Progress(0, 1), None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.backbone.named_buffers())


def test_one_group_is_left_to_batch_norm_itself() -> None:
    method = build("moco_v2", method={"bn_groups": 1})
    assert not method.group_statistics(1, method.backbones()).statistics
    assert build("moco_v2", method={"bn_groups": 3}).group_statistics(3, method.backbones()).statistics


@pytest.mark.parametrize("momentum", [0.1, 0.35, None])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)])
def test_the_norm_across_processes_keeps_pytorchs_statistics(momentum: float | None, shape: tuple[int, ...]) -> None:
    """On one process it is `BatchNorm` itself, also with ``momentum = None``, the mean over all batches."""
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4, momentum=momentum).double()
    ours = GlobalBatchNorm(copy.deepcopy(norm))
    for step in range(STEPS):
        rows = 2 + torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        torch.testing.assert_close(ours(rows), norm(rows), rtol=1e-12, atol=1e-12)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)


def test_statistics_that_are_the_mean_over_all_batches_count_a_step_of_groups_once() -> None:
    """``momentum = None``: after two steps of three groups, the mean over the six groups' means."""
    norm = nn.BatchNorm1d(4, momentum=None).double()
    groups = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in groups.chunk(2):
        statistics = GroupStatistics([norm], 3)
        for part in step:
            statistics.start_slice()
            norm(part)
            statistics.end_slice()
        statistics.finish()
    assert norm.num_batches_tracked.item() == 2
    torch.testing.assert_close(norm.running_mean, groups.mean(dim=(0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, groups.var(dim=1).mean(dim=0), rtol=1e-12, atol=1e-12)
