"""launch/multinode.sh with two agents on this machine: one is lost, and the run goes on to the same bits."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.folder import number, steps
from tests.launch.job import SMALL, cells, forked, needs_cli
from tests.processes import Limit, Process, end, started

pytestmark = needs_cli

STEPS = 80
OPTIONS = [*SMALL, "--steps", str(STEPS)]
TIMEOUT = 240


@contextlib.contextmanager
def agent(store: dist.TCPStore, run: Path) -> Iterator[Process]:
    """One agent with one rank, of two."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "HEAD": "127.0.0.1",
        "PORT": str(store.port),
        "NNODES": "2",
        "RUN": str(run),
        "SAVE_EVERY": "10",
        # our store serves the rendezvous, so no port is raced for; a dead agent is noticed soon
        "RDZV_CONF": "is_host=0,join_timeout=1200,keep_alive_interval=1",
    }
    with started(["launch/multinode.sh", *OPTIONS], environment=environment, together=True) as process:
        yield process


def wait_for(path: Path) -> None:
    limit = Limit(TIMEOUT)
    while not path.exists():
        assert not limit.over(), f"no {path.name} in time"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds an agent's ranks in /proc")
def test_a_run_that_lost_a_machine_and_its_newest_checkpoint_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(hours=1), wait_for_workers=False)
    run = tmp_path / "run"
    with agent(store, run) as first:
        with agent(store, run) as second:
            wait_for(run / "step-000020" / "run.json")
            end(
                second
            )  # what a machine's power switch does: the agent and its rank end at once, and say nothing
        newest = steps(run)[-1]
        os.truncate(newest / "__1_0.distcp", 100)
        assert first.poll() is None
        with agent(store, run) as third:
            codes = first.within(TIMEOUT), third.within(TIMEOUT)
    said = [process.printed() for process in (first, second, third)]
    assert codes == (0, 0), "\n".join(said)
    assert any(f"[DC503] left out, damaged: {newest}/__1_0.distcp " in log for log in said), "\n".join(said)
    resumed = [log for log in said if "resumed " in log]
    assert len(resumed) == 1, "\n".join(said)
    assert f"resumed {run}/step-{number(newest) - 10:06d} " in resumed[0]
    whole = forked("--steps", STEPS)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for row in ("last loss", "last gradients", "last parameters"):
        assert cells(resumed[0], row) == cells(whole.stdout, row)
