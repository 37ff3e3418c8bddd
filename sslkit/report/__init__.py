"""How a run is looked at."""

from sslkit.report.pictures import draw_run

__all__ = ["draw_run"]
