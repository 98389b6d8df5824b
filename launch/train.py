"""Train a byte-level GPT on real text, with its blocks recomputed in backward.

    torchrun --standalone --nproc_per_node 2 launch/train.py --compare
    torchrun --standalone --nproc_per_node 2 launch/train.py --steps 200 --save runs/a --save-every 50
    torchrun --standalone --nproc_per_node 2 launch/train.py --steps 200 --resume runs/a

Exit code: 0, or 1 if a comparison is not equal to the bit, or 2 for input it cannot use.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """The command line; returns the exit code."""
    if __package__ in (None, ""):
        # Run as a file. Put the checkout where this file's own folder was, so that the packages beside it
        # are found, installed or not, and no module here can stand in for another of the same name.
        root = Path(__file__).resolve().parents[1]
        sys.path[0:1] = [str(root), str(root / "backends")]
    if find_spec("torch") is None:
        print("launch/train.py: [DC500] torch is not installed: pip install -e '.[cli]'", file=sys.stderr)
        return 2
    from launch.app import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
