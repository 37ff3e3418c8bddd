"""How training runs: the loop, its optimizer, checkpoints, journal and monitors."""

from sslkit.engine.run import Run, train

__all__ = ["Run", "train"]
