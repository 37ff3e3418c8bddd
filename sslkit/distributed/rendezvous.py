"""Give each start of a process group its own prefix in the store of the launcher.

torchrun keeps one store over all restarts, in which restarted processes would find the addresses of dead ones and wait
for them (seen with torch 2.15, gloo). The restart count differs between nodes, so the first process chooses a random
prefix and sends it to those that ask now.
"""

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from sslkit.errors import RunError

SCHEME = "sslkit"
INTERVAL = 0.02  # seconds between two checks; Python handles signals meanwhile, not during a wait of the store


def rendezvous_url() -> str | None:
    """The ``init_method`` of the process group; None if the launcher creates a store for every start."""
    return f"{SCHEME}://" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


def agree_on_prefix(store: Store, rank: int, processes: int, timeout: timedelta) -> str:
    """Agree on a random prefix that only these processes share; raise a RunError if one does not join in time.

    Each process but the first writes a random token and waits for the answer to it. The first answers all tokens until
    every process has confirmed. Answers to tokens of dead processes are never read.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    prefix = uuid.uuid4().hex
    if rank:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        while not store.check([f"answer/{token}"]):
            _pause(deadline, "process 0")
        prefix = str(store.get(f"answer/{token}"), "utf-8")
        store.set(f"{prefix}/{rank}", "here")
        return prefix
    missing = set(range(1, processes))
    while missing:
        for other in sorted(missing):
            if store.check([f"token/{other}"]):
                store.set(f"answer/{store.get(f'token/{other}').decode()}", prefix)
        missing = {other for other in missing if not store.check([f"{prefix}/{other}"])}
        _pause(deadline, f"process {min(missing)}" if missing else "")
    return prefix


def _pause(deadline: float, process: str) -> None:
    if time.monotonic() > deadline:
        raise RunError(f"{process} did not join the run in time; run the same command again")
    if process:
        time.sleep(INTERVAL)


def _rendezvous(_url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, processes in rendezvous("env://", timeout=timeout, **options):
        yield PrefixStore(agree_on_prefix(store, rank, processes, timeout), store), rank, processes


register_rendezvous_handler(SCHEME, _rendezvous)
