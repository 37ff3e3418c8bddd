"""``sslkit pretrain`` as a module for launchers: ``accelerate launch -m sslkit.pretrain RECIPE``, or torchrun."""

import sys

from sslkit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain")
    main()
