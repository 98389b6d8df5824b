"""Live CPU tensor bytes while something runs, from the profiler's allocator events."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


class LiveBytes:
    """Bytes over the level at the start: ``peak`` at the highest point, ``end`` at the end."""

    def __init__(self) -> None:
        self.peak = 0
        self.end = 0


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    # the profiler's native side writes two lines per use there; Python's own errors come after the body
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


@contextmanager
def tracked() -> Iterator[LiveBytes]:
    """Track CPU allocations of the body; blocks older than it that are freed inside count negative."""
    seen = LiveBytes()
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield seen
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    blocks = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    blocks.sort(key=lambda e: e["ts"])
    for block in blocks:
        seen.end += block["args"]["Bytes"]
        seen.peak = max(seen.peak, seen.end)


def peak_of(job: Callable[[], Any]) -> tuple[int, int]:
    """Run a job; return its peak bytes and the bytes still held when it is done and its result dropped."""
    with tracked() as seen:
        job()
    return seen.peak, seen.end
