"""Reports about runs: HTML pages and PNG pictures. Read `html_page` first: it lists the panels of a page."""

from sslkit.report.html_page import write_report, write_views
from sslkit.report.pictures import draw_curves, draw_run
from sslkit.report.run_record import RunRecord, read_run, read_runs
from sslkit.report.summary import Summary, summarise

__all__ = [
    "RunRecord",
    "Summary",
    "draw_curves",
    "draw_run",
    "read_run",
    "read_runs",
    "summarise",
    "write_report",
    "write_views",
]
