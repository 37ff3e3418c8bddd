"""``sslkit watch``: a live page about a run in another process. It reads files only and does not import PyTorch."""

from sslkit.watch.live import watch

__all__ = ["watch"]
