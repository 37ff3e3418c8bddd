"""The plan of device views: nothing is waited for, and a sample's view does not depend on the rest of its batch."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.data.augment.device_plan import plan_views
from sslkit.data.augment.gpu import finish_on
from sslkit.data.augment.parameters import draw_params
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.batch import Batch, DevicePlan

SIDE = 24
CPU = torch.device("cpu")
POLICIES: dict[str, dict[str, Any]] = {
    "moco_v1": {},
    "moco_v2": {},
    "moco_v3": {"rotate_degrees": 20.0, "erase_prob": 0.5},
    "simclr": {},
    "byol": {},
    "swav": {},
}


def config_of(name: str) -> ViewsConfig:
    return ViewsConfig.of_policy(name, device="accelerator", **{"size": SIDE, **POLICIES[name]})


def rows_of(config: ViewsConfig, count: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    return [
        np.stack([draw_params(policy, (0, 0, sample, view), (375, 500)).as_row() for sample in range(count)])
        for view, policy in enumerate(config.view_policies())
    ]


def batch_of(config: ViewsConfig, count: int) -> Batch:
    sides = [policy.size for policy in config.view_policies()]
    generator = torch.Generator().manual_seed(0)
    views = [torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator) for side in sides]
    plan = plan_views(rows_of(config, count), config.view_policies(), sides)
    return Batch(views, torch.arange(count), plan=plan)


@pytest.mark.parametrize("name", POLICIES)
def test_a_view_does_not_depend_on_its_batch(name: str) -> None:
    """Samples are brought into other orders for each step, and come out in their places."""
    config, batch = config_of(name), batch_of(config_of(name), 40)
    finished = finish_on(CPU, batch, config)
    rows, policies = rows_of(config, 40), config.view_policies()
    sides = [policy.size for policy in policies]
    for sample in range(0, 40, 3):
        plan = plan_views([each[sample : sample + 1] for each in rows], policies, sides)
        one = Batch([view[sample : sample + 1] for view in batch.views], torch.arange(1), plan=plan)
        for alone, together in zip(finish_on(CPU, one, config).views, finished.views, strict=True):
            off = (alone[0].int() - together[sample].int()).abs()
            # Kernels of a batch are as wide as its widest; a sum with more zeros may round to another level.
            assert off.max() <= 1
            assert (off > 0).float().mean() < 2e-3
    assert all(view.is_contiguous() for view in finished.views)
    assert all(not torch.equal(view, crop) for view, crop in zip(finished.views, batch.views, strict=True))


def test_a_batch_without_steps_is_left() -> None:
    config = ViewsConfig.of_policy("moco_v2", size=SIDE, jitter_prob=0, gray_prob=0, blur_prob=0, flip_prob=0)
    batch = batch_of(config, 3)
    finished = finish_on(CPU, batch, config)
    assert all(torch.equal(one, other) for one, other in zip(finished.views, batch.views, strict=True))


class FakeGpu(FakeTensorMode):
    """Asks for no driver."""

    avoid_device_init = True


class Calls(TorchDispatchMode):
    """Counts what is asked of the fake GPU: uploads, reads by the host, and launches on whole images."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        out, returns = func(*args, **kwargs), func._schema.returns
        gives = [each for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, Tensor)]
        takes = [each for each in args if isinstance(each, Tensor)]
        if name in ("_to_copy", "copy_") and gives[0].is_cuda and not takes[-1].is_cuda:
            self.found["upload" if kwargs.get("non_blocking") else "blocking upload"] += 1
        elif name in ("_local_scalar_dense", "nonzero", "masked_select") and takes[0].is_cuda:
            self.found["read"] += 1
        elif name != "device" and not any(each.alias_info and not each.alias_info.is_write for each in returns):
            self.found["launch"] += any(each.is_cuda and each.numel() >= SIDE**2 for each in [*gives, *takes])
        return out


@pytest.mark.parametrize(("name", "launches"), [("moco_v2", 306), ("moco_v3", 306), ("simclr", 280)])
def test_the_device_is_not_waited_for(name: str, launches: int) -> None:
    """One upload for the parameters of both views; the launches are few more than the steps' arithmetic."""
    config = config_of(name).model_copy(update={"rotate_degrees": 0.0, "erase_prob": 0.0})
    batch, calls = batch_of(config, 64), Calls()
    assert isinstance(batch.plan, DevicePlan)
    with FakeGpu() as mode:
        fake = Batch(
            [mode.from_tensor(view) for view in batch.views],
            mode.from_tensor(batch.sample_ids),
            plan=replace(batch.plan, packed=mode.from_tensor(batch.plan.packed)),
        )
        with calls:
            finished = finish_on(torch.device("cuda", 0), fake, config)
    assert all(view.is_cuda and view.shape == (64, SIDE, SIDE, 3) for view in finished.views)
    assert calls.found["upload"] == len(batch.views) + 2  # the crops, the ids, the plan
    assert not calls.found["blocking upload"]
    assert not calls.found["read"]
    assert calls.found["launch"] <= launches
