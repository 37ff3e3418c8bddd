"""``sslkit watch``: a live page in the terminal about a run in another process. Read `live`, then `watched_run`.

It only reads files and does not import PyTorch, so it starts in a third of a second.
"""

from sslkit.watch.live import watch

__all__ = ["watch"]
