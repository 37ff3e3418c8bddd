"""``sslkit bench``: where the time of a recipe's step goes on this machine and this data, and what would help most."""

from sslkit.profiling.speed_advice import Change, changes_that_help
from sslkit.profiling.step_profile import Profile, profile

__all__ = ["Change", "Profile", "changes_that_help", "profile"]
