"""The door that launchers open: ``accelerate launch -m sslkit.pretrain RECIPE``, or torchrun, or plain python."""

import sys

from sslkit.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
