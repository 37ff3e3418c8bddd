"""``sslkit bench``: where the time of a training step goes on this machine and data, and which change helps most.

Start with `step_profile.py`.
"""

from sslkit.profiling.speed_advice import Change, changes_that_help
from sslkit.profiling.step_profile import Profile, profile

__all__ = ["Change", "Profile", "changes_that_help", "profile"]
