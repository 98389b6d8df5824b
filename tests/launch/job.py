"""Runs the training job as a user does, under torchrun; or, in half the time, on ranks forked from one process."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT, run
from tests.ranks.spawn import run_ranks

__all__ = ["ROOT", "SMALL", "cells", "forked", "needs_cli", "torchrun"]

needs_cli = pytest.mark.skipif(
    importlib.util.find_spec("tyro") is None, reason="launch/ needs the cli extra: pip install -e '.[cli]'"
)
SMALL = ["--layers", "2", "--width", "32", "--context", "16", "--batch", "2"]


def torchrun(*arguments: object, ranks: int = 2, limit: float = 120) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py on a small model; a free port is torchrun's to find."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["launch/train.py", *SMALL, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run(command, limit=limit, environment=environment)


def forked(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """As :func:`torchrun`, without torchrun, which a few tests are enough for. What ranks print comes rank by rank."""
    every = run_ranks("tests.launch.train", ranks, *SMALL, *map(str, arguments), check=False)
    code = next((rank["exit"] for rank in every if rank["exit"]), 0)
    return subprocess.CompletedProcess([], code, "".join(rank["output"] for rank in every), "")


def cells(output: str, row: str) -> list[str]:
    """The cells of a table's row, by the row's name."""
    found = re.search(rf"^│ {re.escape(row)} +│(.+)│$", output, re.MULTILINE)
    assert found, f"no row {row!r} in:\n{output}"
    return [cell.strip() for cell in found[1].split("│")]
