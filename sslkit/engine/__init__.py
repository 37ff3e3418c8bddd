"""How training runs: the loop, its optimizer, checkpoints, journal and monitors."""

from sslkit.engine.run_folder.layout import Run
from sslkit.engine.setup import train

__all__ = ["Run", "train"]
