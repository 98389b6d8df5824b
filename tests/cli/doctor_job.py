"""One rank of a doctor's visit in which rank 1 has something. Its argument: "well", "differs" or "dies"."""

from __future__ import annotations

import os
import sys

from distckpt.cli import selftest
from distckpt.cli.main import main
from tests.ranks.spawn import report


def visit(what: str) -> int:
    if os.environ["RANK"] == "1" and what == "dies":
        os._exit(9)
    if os.environ["RANK"] == "1" and what == "differs":
        wrong = selftest.Result("cpu", "dropout", "dc.checkpoint", "differs", "gradient 0")
        selftest.run_selftests = lambda devices: [wrong]  # type: ignore[assignment]
    code = main(["doctor", "--device", "cpu", "--timeout", "2" if what == "dies" else "120"])
    report(code)
    return 0


if __name__ == "__main__":
    sys.exit(visit(sys.argv[1]))
