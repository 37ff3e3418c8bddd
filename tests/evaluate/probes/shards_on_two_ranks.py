"""Run by test_sharded_bank.py: kNN with a bank in shards, on as many processes as torchrun starts. Prints RESULT."""

import json

import torch
import torch.distributed as dist

from sslkit.distributed.collectives import rank, world_size
from sslkit.evaluate.probes import sharded_bank
from sslkit.evaluate.probes.knn import KnnProtocol
from sslkit.evaluate.probes.sharded_bank import Shard, in_order, own_images, predict_by_shards


def main() -> None:
    """Deal features of small integers, whose similarities tie often, and classify."""
    dist.init_process_group("gloo")
    sharded_bank.MAX_ROWS = 16  # several blocks
    generator = torch.Generator().manual_seed(0)
    bank = torch.randint(-2, 3, (601, 4), generator=generator).float()
    queries = torch.randint(-2, 3, (75, 4), generator=generator).float()
    labels = torch.randint(7, (601,), generator=generator)
    kept, asked = torch.rand(601, generator=generator) > 0.2, torch.rand(75, generator=generator) > 0.2
    bank[~kept], queries[~asked] = torch.nan, torch.nan  # have no meaning
    cpu = torch.device("cpu")
    shards = [
        Shard(features[torch.from_numpy(own_images(len(features)))], readable, cpu)
        for features, readable in ((queries, asked), (bank, kept))
    ]
    assert all(shard.is_finite() for shard in shards)
    assert torch.equal(in_order(torch.from_numpy(own_images(601)), 601), torch.arange(601))
    found = {}
    for name, protocol in (("plain", KnnProtocol(5)), ("centred", KnnProtocol(40, centre=True))):
        predicted, rows = predict_by_shards(*shards, labels, 7, protocol, most=6)
        found[name] = [predicted[asked].tolist(), rows[asked].tolist()]
    if rank() == world_size() - 1:  # the last process has what the first has
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


main()
