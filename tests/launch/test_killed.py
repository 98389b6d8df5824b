"""A save that is killed leaves a complete checkpoint or none, wherever it was."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import pytest

from tests.processes import ROOT, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="ranks are forks")
KILL = int(signal.SIGKILL)
STEPS = {"step-000002", "step-000004"}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `killed.py` found."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'backends'}"
    done = run(
        [sys.executable, "-m", "tests.launch.killed", tmp_path_factory.mktemp("kills")],
        environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        limit=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_one_rank_or_all_are_killed_ahead_of_every_call_to_the_file_system(said: dict[str, Any]) -> None:
    for case in {(kill["template"], kill["rank"], kill["die"]) for kill in said["kills"]}:
        killed = [k["killed"] for k in said["kills"] if (k["template"], k["rank"], k["die"]) == case]
        rank, together = case[1], case[2] == "together"
        assert len(killed) > (8 if rank == 0 else 2), case
        assert all(statuses[rank] == KILL for statuses in killed[:-1]), case
        assert all(statuses[1 - rank] == KILL for statuses in killed[:-1] if together), case
        assert killed[-1] == [0, 0], case


def test_what_a_killed_save_leaves_is_complete_or_not_there(said: dict[str, Any]) -> None:
    seen: dict[str, set[str]] = {"new": set(), "over": set()}
    for kill in said["kills"]:
        allowed = {name: said[name]["steps"]["step-000004"] for name in ("over", "done")}
        found = kill["steps"].get("step-000004")
        assert kill["steps"]["step-000002"] == said["new"]["steps"]["step-000002"]
        assert set(kill["steps"]) <= STEPS
        names = {name for name, files in allowed.items() if files == found} if found else {"none"}
        assert len(names) == 1, kill
        seen[kill["template"]] |= names
    assert seen == {"new": {"none", "done"}, "over": {"none", "over", "done"}}


def test_a_rank_that_is_killed_in_the_middle_of_a_file_leaves_no_checkpoint(said: dict[str, Any]) -> None:
    assert said["cut"]["killed"][1] == int(signal.SIGXFSZ)
    assert set(said["cut"]["steps"]) == {"step-000002"}
    assert said["cut"]["hidden"] == 1


def test_the_next_run_saves_the_same_step_and_takes_away_what_was_left(said: dict[str, Any]) -> None:
    assert said["resumed"]["parameters"] == said["done"]["parameters"]
    assert said["resumed"]["steps"] == said["done"]["steps"]
    assert said["resumed"]["hidden"] == 0
