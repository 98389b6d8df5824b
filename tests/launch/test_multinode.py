"""launch/multinode.sh with two agents on this machine: one is lost, and the run goes on to the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.launch.job import ROOT, SMALL, cells, needs_cli, torchrun

pytestmark = needs_cli

STEPS = 60
OPTIONS = [*SMALL, "--steps", str(STEPS)]
TIMEOUT = 240


@contextlib.contextmanager
def agent(store: dist.TCPStore, run: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One agent with one rank, of two; it and its rank are gone at the end."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "HEAD": "127.0.0.1",
        "PORT": str(store.port),
        "NNODES": "2",
        "RUN": str(run),
        "SAVE_EVERY": "10",
        # our store serves the rendezvous, so no port is raced for; a dead agent is noticed soon
        "RDZV_CONF": "is_host=0,join_timeout=200,keep_alive_interval=1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["launch/multinode.sh", *OPTIONS], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            lose(process)


def lose(process: subprocess.Popen[bytes]) -> None:
    """What a machine's power switch does: the agent and its ranks end at once, and say nothing."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        for pid in [process.pid, *map(int, ranks.read_text().split())]:
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(path: Path, *logs: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        said = "\n".join(log.read_text() for log in logs)
        assert time.monotonic() < end, f"no {path.name} in time:\n{said}"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds an agent's ranks in /proc")
def test_a_run_that_lost_a_machine_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)
    run, logs = tmp_path / "run", [tmp_path / f"{name}.log" for name in "abc"]
    with agent(store, run, logs[0]) as first:
        with agent(store, run, logs[1]) as second:
            wait_for(run / "step-000010" / "run.json", *logs[:2])
            lose(second)
        assert first.poll() is None
        with agent(store, run, logs[2]) as third:
            codes = first.wait(TIMEOUT), third.wait(TIMEOUT)
    said = "\n".join(log.read_text() for log in logs)
    assert codes == (0, 0), said
    resumed = [log.read_text() for log in logs if "resumed " in log.read_text()]
    assert len(resumed) == 1, said
    whole = torchrun("--steps", STEPS)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for row in ("last loss", "last gradients", "last parameters"):
        assert cells(resumed[0], row) == cells(whole.stdout, row)
