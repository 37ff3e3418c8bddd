"""The doctor: what this machine can do, and whether a recipe is wired right, before a GPU hour is spent.

Nothing is written to disk. A fault is a defect in the wiring; advice never is.
"""

from sslkit.doctor.findings import Finding, Report
from sslkit.doctor.machine_checks import examine_machine
from sslkit.doctor.run_checks import examine

__all__ = ["Finding", "Report", "examine", "examine_machine"]
