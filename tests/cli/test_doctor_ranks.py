"""``distckpt doctor`` on two ranks: both are tested, rank 0 prints for both, a rank that fails is named."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.ranks.spawn import run_ranks

from .process import torchrun
from .test_doctor import validate


def visit(what: str) -> tuple[Any, Any]:
    first, second = run_ranks("tests.cli.doctor_job", 2, what, check=False)
    return first, second


@pytest.fixture(scope="module")
def under_torchrun() -> subprocess.CompletedProcess[str]:
    return torchrun("-m", "distckpt", "doctor", "--json", "--device", "cpu")


def test_under_torchrun_the_report_is_printed_once(under_torchrun: subprocess.CompletedProcess[str]) -> None:
    assert under_torchrun.returncode == 0, under_torchrun.stdout + under_torchrun.stderr
    found = json.loads(under_torchrun.stdout)
    validate(found, "doctor")
    assert under_torchrun.stderr.count("replaying on cpu on each of 2 ranks") == 1


def test_under_torchrun_every_rank_is_tested(under_torchrun: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(under_torchrun.stdout)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    first, second = (rank["results"] for rank in found["ranks"])
    assert first == second
    assert {result["status"] for result in second} == {"equal"}
    assert found["findings"]["launch"][0]["text"].startswith("rank 0 of 2, meeting at ")


def test_a_rank_that_fails_is_named_and_every_rank_exits_with_1() -> None:
    first, second = visit("differs")
    assert (first["report"], second["report"]) == (1, 1), first["output"] + second["output"]
    assert "FAIL  cpu      rank 1: dropout, dc.checkpoint: gradient 0  [DC704]" in first["output"]
    assert "Replay self-test" not in second["output"]


def test_a_rank_that_died_is_named() -> None:
    first, second = visit("dies")
    assert second["exit"] == 9
    assert first["report"] == 1, first["output"]
    assert "FAIL  missing  rank 1 said nothing within 2 s" in first["output"]
