"""The ``sslkit`` command: parse arguments, call a function, print its result. Read `app` first.

Heavy imports are inside the commands, so that ``--help`` is fast.
"""

from sslkit.cli.app import app, main

__all__ = ["app", "main"]
