"""kNN with a bank in shards: any number of processes finds what one finds in the whole bank."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_two_processes import run

from sslkit.evaluate.probes.exact_search import nearest
from sslkit.evaluate.probes.knn import KnnProtocol, predict, unit_rows
from sslkit.evaluate.probes.sharded_bank import Shard, predict_by_shards


def classified(processes: int) -> dict[str, Any]:
    script = str(Path(__file__).parent / "shards_on_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    result = run(command)
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def test_two_processes_and_one_find_the_same() -> None:
    assert classified(2) == classified(1)


@pytest.mark.full
def test_three_processes_find_the_same() -> None:
    assert classified(3) == classified(1)


def test_one_process_finds_what_a_whole_bank_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(rows, 9, generator=generator) for rows in (300, 41))
    labels = torch.randint(5, (300,), generator=generator)
    kept, asked = torch.rand(300, generator=generator) > 0.3, torch.rand(41, generator=generator) > 0.3
    cpu, protocol = torch.device("cpu"), KnnProtocol(20)
    predicted, rows = predict_by_shards(Shard(queries, asked, cpu), Shard(bank, kept, cpu), labels, 5, protocol, 6)
    [expected] = predict(queries[asked], bank[kept], labels[kept], 5, [protocol])
    assert torch.equal(predicted[asked], expected)
    found = nearest(queries[asked], bank[kept], 20, partial(unit_rows, 0.0))[1]
    assert torch.equal(rows[asked], kept.nonzero()[:, 0][found])


def test_features_of_images_that_were_read_must_be_finite() -> None:
    features, readable = torch.ones(4, 2), torch.tensor([True, True, True, False])
    features[3] = torch.inf
    shard = Shard(features, readable, torch.device("cpu"))
    assert shard.is_finite()
    features[1, 1] = torch.nan
    assert not shard.is_finite()
