"""Runs the command as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT, run

PATHS = os.pathsep.join([str(ROOT), str(ROOT / "backends")])


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what a launcher or a user may have set, and with our packages on the path."""
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NO_COLOR",
        "FSDP_ACTIVATION_CHECKPOINTING",
    )
    kept = {k: v for k, v in os.environ.items() if k not in launcher}
    return {**kept, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **changes}


def python(*arguments: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``."""
    command = [sys.executable, *arguments]
    return run(command, limit=240, environment=environment(**changes), cwd=cwd or Path.cwd())


def distckpt(*arguments: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """``python -m distckpt ARGUMENTS``."""
    return python("-m", "distckpt", *arguments, cwd=cwd, **changes)


def torchrun(*arguments: object, cwd: Path | None = None, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun ARGUMENTS`` on this machine; a free port is torchrun's to find."""
    started = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return python(*started, *arguments, cwd=cwd)
