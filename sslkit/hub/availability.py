"""Whether the Hugging Face Hub can be reached, checked once instead of by the retries of every library."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from logging import ERROR

import datasets
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import logging

TIMEOUT = 5.0  # seconds


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the Hub's libraries, and let them use their caches only if the Hub cannot be reached.

    With ``HF_HUB_OFFLINE=1`` no connection is made.
    """
    before = logging.get_verbosity(), datasets.logging.get_verbosity()
    offline = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    logging.set_verbosity(ERROR)
    datasets.logging.set_verbosity(ERROR)
    if not constants.HF_HUB_OFFLINE and not is_reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = offline
        logging.set_verbosity(before[0])
        datasets.logging.set_verbosity(before[1])


@cache
def is_reachable() -> bool:
    """Whether the Hub answers within `TIMEOUT`; checked once per process."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # its type depends on the version of huggingface_hub
        return False
    return True


def unavailable_reason() -> str:
    """Why the Hub cannot be used, to append to an error message; empty if it can."""
    if constants.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set, so the Hub was not contacted"
    return "" if is_reachable() else f"; the Hub, {constants.ENDPOINT}, cannot be reached from here"
