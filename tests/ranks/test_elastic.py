"""A real torchrun with one elastic restart.

Torch 2.13 gives every restart the same store, and gloo then finds the addresses of processes that are gone; so the
run with a gloo group turns the sharing off. Without a group the shared store is just what our keys must survive.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from tests.processes import ROOT, run


def torchrun(*arguments: str, **environment: str) -> str:
    """What the ranks print."""
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "tests.ranks.jobs.elastic"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = run(
        [sys.executable, "-m", "torch.distributed.run", *options, *arguments],
        environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        limit=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["group", "store"])
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    shared = "0" if request.param == "store" else "1"
    output = torchrun(request.param, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=shared)
    parts = [part.split("\n")[0] for part in output.split("@@report ")[1:]]
    return sorted((json.loads(part) for part in parts), key=lambda said: said["rank"])


def test_the_round_after_a_restart_agrees_and_does_not_see_the_first_rounds_messages(reports: Any) -> None:
    assert [said["rank"] for said in reports] == [0, 1]
    assert {said["restart"] for said in reports} == {1}


def test_torchrun_is_recognised(reports: Any) -> None:
    assert {said["launcher"] for said in reports} == {"torchrun"}


def test_a_plan_of_the_world_before_it_shrank_is_refused_after_the_restart(reports: Any) -> None:
    for said in reports:
        assert "[DC402] the world shrank: the plan is for 3 ranks, and there are 2" in said["shrunk"]
        assert "elastic restart 1" in said["shrunk"]
