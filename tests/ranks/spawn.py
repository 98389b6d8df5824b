"""Start real gloo ranks for a test: a job module per file, run once, its findings read by many tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.processes import ROOT, Late, logs, started

__all__ = ["ROOT", "Failed", "leave", "report", "run_ranks"]


class Failed(AssertionError):
    """A rank did not exit with 0; the text is what every rank printed."""


def run_ranks(
    job: str,
    world: int,
    *arguments: str,
    timeout: float = 240,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``python -m JOB ARGUMENTS`` on ``world`` ranks; returns what each passed to :func:`report`, by rank.

    The ranks see torchrun's environment. The store is served from here, on a port that the system chose, so that
    tests in parallel never meet. ``timeout`` is in seconds of a machine without other work.
    ``check=False`` returns ``{"exit": code, "output": text, "report": ...}`` of each.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, None, True, timeout=timedelta(seconds=10 * timeout), wait_for_workers=False
    )
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the ranks are clients of our store
        "TORCHELASTIC_RUN_ID": f"test-{store.port}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        **(environment or {}),
    }
    folder = Path(tempfile.mkdtemp(prefix="distckpt-test-"))
    logs.append(folder)
    ranks = range(world)
    command = [sys.executable, "-m", "tests.ranks.forked", folder, job, ",".join(map(str, ranks)), *arguments]
    with started(command, environment=shared, together=True) as process, contextlib.suppress(Late):
        process.within(timeout)
    outputs = [_read(folder / f"rank-{rank}") + (process.printed() if not rank else "") for rank in ranks]
    found = [_result(text) for text in outputs]
    codes = [
        int(_read(folder / f"exit-{rank}") or -signal.SIGKILL) for rank in ranks
    ]  # or it was ended with the rest
    if not check:
        return [{"exit": c, "output": o, "report": f} for c, o, f in zip(codes, outputs, found, strict=True)]
    if any(codes):
        raise Failed(
            "\n".join(
                f"--- rank {i}: exit {c}\n{o}" for i, (c, o) in enumerate(zip(codes, outputs, strict=True))
            )
        )
    return found


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


_MARK = "@@report "


def _result(text: str) -> Any:
    lines = [line for line in text.splitlines() if line.startswith(_MARK)]
    return json.loads(lines[-1][len(_MARK) :]) if lines else None


def report(value: Any) -> None:
    """In a rank: give ``value`` (JSON) to the test."""
    print(_MARK + json.dumps(value), flush=True)


def leave() -> None:
    """In a rank, last: meet the others and go at once (gloo's threads may abort when a peer is gone first)."""
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)
