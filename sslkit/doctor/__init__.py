"""Checks before a run: what this machine can do, and whether a recipe will train well on its data.

Start with `run_checks.py`, which calls one file for each kind of check. Nothing is written to disk.
"""

from sslkit.doctor.findings import Finding, Report
from sslkit.doctor.machine_checks import check_machine
from sslkit.doctor.run_checks import check_recipe

__all__ = ["Finding", "Report", "check_machine", "check_recipe"]
