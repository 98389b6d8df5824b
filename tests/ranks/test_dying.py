"""A rank is killed or stopped at each point of a check: the others get one error that names it, within the timeout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.dying import cases
from tests.ranks.spawn import run_ranks

AGREE = [case for case in cases() if case.startswith("agree")]
DIFFER = [case for case in cases() if not case.startswith("agree")]


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    (results,) = run_ranks("tests.ranks.jobs.dying", 1)
    return results


def others(found: dict[str, list[Any]], case: str) -> list[Any]:
    who = cases()[case][0]
    return [rank for number, rank in enumerate(found[case]) if number != who]


@pytest.mark.parametrize("case", AGREE)
def test_a_rank_that_goes_before_or_while_it_compares_is_named_on_all_others(found: Any, case: str) -> None:
    first, second = others(found, case)
    assert first["code"] == second["code"] == "DC404", (first, second)
    assert first["text"] == second["text"]
    came = int(case.split()[-1]) > 1  # its message was written
    assert ("rank 2 came to check 1 and stopped answering" in first["text"]) == came
    assert ("rank 2 did not come to check 1" in first["text"]) != came


@pytest.mark.parametrize("case", DIFFER)
def test_a_disagreement_is_not_lost_when_a_rank_goes_and_that_rank_is_named_too(
    found: Any, case: str
) -> None:
    first, second = others(found, case)
    assert first["code"] == second["code"] == "DC407", (first, second)
    assert first["text"] == second["text"]
    assert "3 ranks differ in: regions of stage 0" in first["text"]
    assert f"rank {cases()[case][0]} came to check 1 and stopped answering" in first["text"]


@pytest.mark.parametrize("case", [case for case in cases() if "stopped" in case])
def test_a_rank_that_was_stopped_and_wakes_up_gets_the_error_of_the_others_and_not_its_own(
    found: Any, case: str
) -> None:
    assert {rank["text"] for rank in found[case]} == {found[case][0]["text"]}


@pytest.mark.parametrize("way", ["given", "environment"])
def test_a_late_rank_is_told_that_rank_0_has_left_when_rank_0_serves_the_store(way: str) -> None:
    (results,) = run_ranks("tests.ranks.jobs.server_left", 1)
    first, second, late = results[way]
    assert first["code"] == "DC404"
    assert "rank 2 did not come to check 1 within 3 s" in first["text"]
    assert second["code"] == "DC404"
    assert late["code"] == "DC404", late
    assert "rank 0, or what serves the store in its place, has not come or has left" in late["text"]
