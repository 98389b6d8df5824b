"""Torchrun on a platform that ignores it, and torch_xla.launch: what the coordinator says (see launched.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from distckpt.ranks import Coordinator
from tests.ranks.spawn import ROOT, run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(Coordinator, "check"), reason="the coordinator has no check() yet"
)

JOB = "tests.xla.launched"
ENVIRONMENT = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def ignored() -> list[Any]:
    """Two processes of torchrun whose process group came over xla://, which the CPU plugin ignores."""
    return run_ranks(JOB, 2, "torchrun", "xla://", environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def launched() -> Any:
    """The one process of torch_xla.launch, which wants an environment without a launcher in it."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    search = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", JOB, "launch"],
        cwd=ROOT,
        env={**clean, **ENVIRONMENT, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=240,
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith("@@report ")]
    assert reports, done.stderr[-4000:]
    return json.loads(reports[-1].removeprefix("@@report "))


def test_xla_on_the_cpu_makes_every_process_of_torchrun_rank_0_of_1(ignored: list[Any]) -> None:
    assert [found["group"] for found in ignored] == [[0, 1], [0, 1]]


def test_the_coordinator_refuses_a_world_that_is_smaller_than_the_launchers(ignored: list[Any]) -> None:
    assert [found["refused"] for found in ignored] == ["WorldMismatch", "WorldMismatch"]
    for rank, found in enumerate(ignored):
        assert f"rank {rank} of 2" in found["text"]
        assert "rank 0 of 1" in found["text"]


def test_a_refused_model_keeps_its_regions_and_runs(ignored: list[Any]) -> None:
    assert all(found["model as before"] for found in ignored)


def test_the_coordinator_agrees_under_torch_xla_launch(launched: Any) -> None:
    assert launched["refused"] is None, launched["text"]
    assert launched["group"] == [0, 1]
    assert launched["index"] == 0
