"""Ranks as forks of one process, which has imported what their job imports: that takes longer than most jobs.

python -m tests.ranks.forked FOLDER JOB RANKS ARGUMENTS

FOLDER gets what rank N prints as ``rank-N``, and its exit code as ``exit-N`` when it has ended.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path


def imports_of(job: str) -> list[str]:
    """The modules that a job's file imports at its top, in order."""
    found = importlib.util.find_spec(job)
    assert found is not None
    assert found.origin is not None
    names: list[str] = []
    for node in ast.parse(Path(found.origin).read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def become(rank: int, folder: Path, job: str, arguments: list[str]) -> None:
    """Run the job as ``rank``; returns or raises as a module that is run does."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    output = os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [job, *arguments]
    runpy.run_module(job, run_name="__main__", alter_sys=True)


def main() -> None:
    """Start the ranks, and note how each ends."""
    folder, job, ranks = Path(sys.argv[1]), sys.argv[2], [int(rank) for rank in sys.argv[3].split(",")]
    arguments = sys.argv[4:]
    for name in imports_of(job):
        with contextlib.suppress(ModuleNotFoundError):  # a job may say first where it is
            importlib.import_module(name)
    if "torch.distributed.fsdp" in sys.modules:
        importlib.import_module("torch._dynamo")  # as the first unit does
    started: dict[int, int] = {}
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            return become(rank, folder, job, arguments)
        started[pid] = rank
    while started:
        pid, status = os.wait()
        rank = started.pop(pid)
        (folder / f"exit-{rank}").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
