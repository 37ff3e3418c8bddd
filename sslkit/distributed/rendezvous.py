"""Where the processes meet: a part of the launcher's store that nobody used before them.

torchrun keeps one store over all its restarts. Processes that it starts again would find there the addresses of those
that died, and wait for them until the timeout, or for ever (seen with torch 2.15, gloo). The number of the restart is
no help: it differs between nodes. So the first process names the meeting anew, and tells only those who now ask.
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
INTERVAL = 0.02  # seconds between two looks; Python sees signals then, which it does not in a wait of the store's


def meeting_place() -> str | None:
    """The ``init_method`` of the processes' group; None where the launcher makes a store for every start."""
    return f"{SCHEME}://" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


def agree_on_name(store: Store, rank: int, processes: int, timeout: timedelta) -> str:
    """A name that these processes share and no earlier ones did, whatever those left in the store.

    Everyone but the first leaves a token of its own and waits for the answer to it; the first answers until all have
    confirmed. A token of a process that is gone is answered too, which does no harm.

    Raises:
        RunError: Somebody did not come in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    name = uuid.uuid4().hex
    if rank:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        _wait_for(store, f"answer/{token}", deadline, "process 0")
        name = str(store.get(f"answer/{token}"), "utf-8")
        store.set(f"{name}/{rank}", "here")
        return name
    missing = set(range(1, processes))
    while missing:
        for other in sorted(missing):
            if store.check([f"token/{other}"]):
                store.set(f"answer/{store.get(f'token/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        _pause(deadline, f"process {min(missing)}" if missing else "")
    return name


def _wait_for(store: Store, key: str, deadline: float, whom: str) -> None:
    while not store.check([key]):
        _pause(deadline, whom)


def _pause(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise RunError(f"{whom} did not come to the start of the run; the same command begins again")
    if whom:
        time.sleep(INTERVAL)


def _rendezvous(_url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, processes in rendezvous("env://", timeout=timeout, **options):
        yield PrefixStore(agree_on_name(store, rank, processes, timeout), store), rank, processes


register_rendezvous_handler(SCHEME, _rendezvous)
