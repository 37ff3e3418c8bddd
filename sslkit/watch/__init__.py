"""A live page about a run in another process. It needs no PyTorch, is there at once, and only ever reads."""

from sslkit.watch.live import watch

__all__ = ["watch"]
