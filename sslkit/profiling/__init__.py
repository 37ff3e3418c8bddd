"""``sslkit bench``: where the time of a training step goes on this machine and data, and which change helps most.

Start with `step_profile.py`.
"""

from sslkit.profiling.speed_advice import Change, changes_that_help
from sslkit.profiling.step_profile import Profile, profile
from sslkit.profiling.step_trace import check_trace, write_trace

__all__ = ["Change", "Profile", "changes_that_help", "check_trace", "profile", "write_trace"]
