"""The comparison of weights over processes, with a process group that receives its own row from everybody."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.distributed import consistency
from sslkit.distributed.consistency import compare_weights
from sslkit.errors import RunError


@pytest.fixture
def three_processes() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield
    dist.destroy_process_group()


class FakeGpu(FakeTensorMode):
    avoid_device_init = True


class Counting(TorchDispatchMode):
    """Counts operators; the host reads zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators[name] += 1
        return 0 if name == "_local_scalar_dense" else func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("three_processes")
def test_the_host_waits_once_for_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def to_list(tensor: Tensor) -> Any:
        downloads.append(tuple(tensor.shape))
        return [[0] * tensor.shape[1]] * tensor.shape[0]

    monkeypatch.setattr(FakeTensor, "tolist", to_list)
    with FakeGpu(), Counting() as counting:
        net = nn.Sequential(*(nn.Linear(5, 5, device="cuda") for _ in range(20)))
        counting.operators.clear()
        compare_weights(net, 7, torch.device("cuda"))
    assert downloads == [(41, 3)]
    assert not {"_local_scalar_dense", "nonzero", "_to_copy"} & counting.operators.keys(), counting.operators


@pytest.mark.usefixtures("three_processes")
@pytest.mark.parametrize(
    ("row", "column", "sentence"),
    [
        (1, 0, "step 7: the processes have diverged: process 1 has a different number of steps than process 0"),
        (2, 1, "step 7: the processes have diverged: process 2 has a different weight than process 0"),
        (slice(1, 3), 2, "step 7: the processes have diverged: processes 1, 2 have a different bias than process 0"),
    ],
)
def test_it_names_tensor_and_processes(row: Any, column: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, tables = nn.Linear(3, 3), []

    def gather(own: Tensor) -> Tensor:
        table = own.repeat(3, 1)
        tables.append(table.clone())
        table[row, column] += 1
        return table

    monkeypatch.setattr(consistency, "gather_rows", gather)
    with pytest.raises(RunError, match=sentence):
        compare_weights(net, 7, torch.device("cpu"))
    assert tables[0][0, 0] == 7
    assert len(set(tables[0][0].tolist())) == 3
    monkeypatch.setattr(consistency, "gather_rows", lambda own: own.repeat(3, 1))
    compare_weights(net, 7, torch.device("cpu"))
