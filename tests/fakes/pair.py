"""Two accelerator types in one process: test files that run in a process of their own.

A file `pair_<noun>.py` holds ordinary tests with the fixtures `lazy` and `fake`. One collected test runs it:

    def test_mixed_types() -> None:
        run_pair_file(Path(__file__).with_name("pair_mixed.py"))
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run


def why_no_pair() -> str | None:
    """Why this torch cannot have a second fake device type; None when it can."""
    import torch
    from torch.utils import backend_registration

    if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return None
    return f"torch {torch.__version__} has no PrivateUse1 device in pure Python (2.10 and later have)"


def run_pair_file(path: Path, *, timeout: float = 120.0) -> None:
    """Run the tests of `path` in a fresh process with both device types; fail with its output if any fails."""
    reason = why_no_pair()
    if reason is not None:
        pytest.skip(reason)
    search = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    done = run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tests.fakes.pair_plugin",
            "-p",
            "no:cacheprovider",
            str(path),
        ],
        environment={**os.environ, "PYTHONPATH": search},
        limit=timeout,
    )
    if done.returncode != 0:
        pytest.fail(f"{path.name} failed in its own process:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
