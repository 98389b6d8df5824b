"""What may be inside a stage or happen around a step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.pipeline_corners import ALL, ROOMS
from tests.ranks.spawn import run_ranks

COUNT = 4
EQUAL = (
    "buffers",
    "buffers, split",
    "nested",
    "nested, split",
    "nested, limited",
    "growing",
    "tied, split",
    "frozen, split",
    "stages alone",
    "failed step",
    "function regions",
)


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run_ranks("tests.ranks.jobs.pipeline_corners", 2)


def reports(found: list[Any], corner: str, key: str = "report") -> list[dict[str, Any]]:
    return [report for rank in found for report in rank[corner][key].values()]


def count(rows: list[list[Any]]) -> int:
    return sum(row[-1] for row in rows)


@pytest.mark.parametrize("corner", EQUAL)
def test_gradients_and_buffers_are_as_without_regions(found: list[Any], corner: str) -> None:
    assert [rank[corner]["equal"] for rank in found] == [True, True]


@pytest.mark.parametrize("corner", [c for c in EQUAL if c not in ("growing", "failed step")])
def test_no_region_is_replayed_twice(found: list[Any], corner: str) -> None:
    assert all(n == 1 for report in reports(found, corner) for *_, n in report["replays"])


def test_regions_that_change_buffers_are_replayed_early(found: list[Any]) -> None:
    first = found[0]["buffers"]["report"]["0"]
    assert first["early"] == first["replays"]
    assert count(first["early"]) == 2 * COUNT


def test_a_region_inside_a_region_is_replayed_early_once(found: list[Any]) -> None:
    first = found[0]["nested"]["report"]["0"]
    assert first["early"] == first["replays"]
    assert count(first["early"]) == 4 * COUNT


def test_a_kept_region_keeps_the_regions_inside_it(found: list[Any]) -> None:
    last = found[1]["nested"]["report"]["1"]
    assert last["replays"] == []
    assert count(last["kept"]) == 2 * COUNT


@pytest.mark.parametrize("ahead", [None, ALL, *ROOMS])
@pytest.mark.parametrize("schedule", ["GPipe", "InterleavedZeroBubble"])
def test_a_region_inside_a_region_runs_three_times_for_a_micro_batch(
    found: list[Any], schedule: str, ahead: Any
) -> None:
    for rank in found:
        assert set(rank[f"inside, {schedule}, {ahead}"]["runs"]) == {3 * COUNT}


def test_the_limit_holds_for_regions_inside_regions(found: list[Any]) -> None:
    first = found[0]["nested, limited"]["report"]["0"]
    assert 0 < first["ahead_bytes"] <= 5 * 1024


def test_values_that_turn_out_too_large_are_dropped_and_made_again_when_needed(found: list[Any]) -> None:
    first = found[0]["growing"]["report"]["0"]
    assert first["ahead_bytes"] <= 20_000
    assert first["lazy"]["more than 20000 bytes ahead, seen after the replay"] >= 1
    assert max(n for *_, n in first["replays"]) == 2


def test_a_step_without_backward_has_no_sessions_and_no_replays(found: list[Any]) -> None:
    for rank in found:
        assert (rank["evaluation"]["replays"], rank["evaluation"]["open"]) == (0, 0)
    for report in reports(found, "evaluation"):
        assert (report["replays"], report["kept"]) == ([], [])
    assert all(
        count(r["replays"]) + count(r["kept"]) == 2 * COUNT for r in reports(found, "evaluation", "after")
    )


def test_stages_without_their_schedule_share_a_replay_but_are_never_early(found: list[Any]) -> None:
    for report in reports(found, "stages alone"):
        assert report["early"] == []
        assert report["lazy"] == {"stages alone do not tell which micro-batch comes next": 2 * COUNT}


def test_remove_leaves_nothing_behind_and_can_be_called_twice(found: list[Any]) -> None:
    assert [(rank["removed"]["on"], rank["removed"]["off"]) for rank in found] == [(True, True)] * 2


def test_a_failed_step_leaves_no_session_open(found: list[Any]) -> None:
    assert found[0]["failed step"]["raised"] == "told to fail"
    assert [rank["failed step"]["open"] for rank in found] == [0, 0]


def test_waits_in_a_computation_of_ones_own_are_reported(found: list[Any]) -> None:
    if found[0]["own computation"].get("skipped"):
        pytest.skip("this torch has no custom computations")
    assert [rank["own computation"]["equal"] for rank in found] == [True, True]
    for report in reports(found, "own computation"):
        # what other ranks send to stages 0 and 2; the neighbour of stage 1 is here, and stage 3 has the loss
        late = count(report["replays"]) - count(report["early"]) if report["stage"] in (0, 2) else 0
        reason = "the computation OVERLAP_F_B of the schedule is a function of your own"
        assert report["lazy"] == ({reason: late} if late else {})


def test_a_gradient_that_came_without_a_wait_that_is_seen_is_reported(found: list[Any]) -> None:
    first = found[0]["unseen wait"]["report"]["0"]
    assert first["early"] == []
    assert first["lazy"] == {"its gradient was received without a wait that is seen": 2 * COUNT}


def test_regions_made_by_calls_belong_to_the_session_too(found: list[Any]) -> None:
    for rank in found:
        for index, report in rank["function regions"]["report"].items():
            assert count(report["replays"]) == 2 * COUNT
            assert bool(report["early"]) == (index != "3")
