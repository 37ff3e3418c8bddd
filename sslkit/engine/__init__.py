"""How training runs: the loop, its optimizer, checkpoints, journal and monitors."""

from sslkit.engine.folder import Run
from sslkit.engine.run import train

__all__ = ["Run", "train"]
