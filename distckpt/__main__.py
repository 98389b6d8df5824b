"""``python -m distckpt``: the same as the ``distckpt`` command, also under ``torchrun -m``."""

import sys

from distckpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
