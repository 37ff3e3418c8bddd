"""The Hub: asked once whether it is there, instead of waiting for every library's retries."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from logging import ERROR

import datasets
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import logging

PATIENCE = 5.0  # seconds


@contextmanager
def quick_hub() -> Iterator[None]:
    """Inside, the Hub's libraries say nothing of retries, and look into their caches only where it cannot be reached.

    ``HF_HUB_OFFLINE=1`` is respected: nobody asks.
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
    """Whether the Hub answers at all within `PATIENCE`; asked once a process."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of which library it is depends on the version: no answer is no answer
        return False
    return True


def why_not() -> str:
    """What to add to a sentence about something that the Hub did not give; empty where it answered."""
    if constants.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set, so the Hub was not asked"
    return "" if is_reachable() else f"; the Hub, {constants.ENDPOINT}, cannot be reached from here"
