"""``python -m sslkit`` runs the ``sslkit`` command."""

from sslkit.cli import main

main()
