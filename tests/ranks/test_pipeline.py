"""Pipeline stages under every schedule, on 2 and 4 real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.pipeline import BLOCKS, FOLDED, MODES, OLD, SCHEDULES, SINGLE
from tests.ranks.spawn import run_ranks

REGION = 3104  # bytes that one block's replay makes, and 1312 of them are inputs of its weights
FOR_WEIGHTS = 1312
# Torch 2.9 waits for gradients of this schedule in a step of their own, before other work.
WAITS = [name for name in SCHEDULES if not (OLD and name == "InterleavedZeroBubble")]
SPLIT = [name for name in ("InterleavedZeroBubble", "ZBVZeroBubble") if name in SCHEDULES]
Found = tuple[int, str, dict[str, Any]]

_findings: dict[int, list[Any]] = {}


@pytest.fixture(params=[2, 4], scope="module")
def world(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    if count not in _findings:
        _findings[count] = run_ranks("tests.ranks.jobs.pipeline", count)
    return count


def cases(world: int, schedule: str, mode: str) -> list[dict[str, Any]]:
    return [rank[schedule][mode] for rank in _findings[world]]


def stages(world: int, schedule: str, mode: str) -> dict[int, dict[str, Any]]:
    """Reports of all stages of the pipeline."""
    return {int(i): r for case in cases(world, schedule, mode) for i, r in case["report"].items()}


def count(rows: list[list[Any]]) -> int:
    return sum(row[-1] for row in rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_losses_gradients_and_the_generators_are_as_without_regions(
    world: int, schedule: str, mode: str
) -> None:
    assert [case["equal"] for case in cases(world, schedule, mode)] == [True] * world


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_region_is_replayed_once_for_a_micro_batch_or_kept(
    world: int, schedule: str, mode: str
) -> None:
    for report in stages(world, schedule, mode).values():
        done = [(mb, region) for mb, region, n in report["replays"] if n == 1]
        done += [(mb, region) for mb, region, n in report["kept"] if n == 1]
        every = [(mb, f"{i} blocks.{i}") for mb in range(2 * world) for i in range(BLOCKS)]
        assert sorted(done) == sorted(every)
        assert count(report["replays"]) + count(report["kept"]) == len(every)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_runs_twice_for_a_micro_batch_or_once_when_kept(world: int, schedule: str, mode: str) -> None:
    for case in cases(world, schedule, mode):
        for index, runs in case["runs"].items():
            kept = count(case["report"][index]["kept"])
            assert sum(runs) == 2 * BLOCKS * 2 * world - kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_session_is_left_after_a_step(world: int, schedule: str, mode: str) -> None:
    assert [case["open"] for case in cases(world, schedule, mode)] == [0] * world


@pytest.mark.parametrize("schedule", WAITS)
def test_every_replay_before_a_gradient_from_another_rank_is_early(world: int, schedule: str) -> None:
    for index, report in stages(world, schedule, "early").items():
        last = index == max(stages(world, schedule, "early"))
        neighbour_here = (
            schedule in FOLDED and index == world - 1
        )  # its gradient comes from the next stage, here
        if last or neighbour_here:
            assert report["early"] == []
        else:
            assert report["early"] == report["replays"]
            assert report["ahead_bytes"] == BLOCKS * REGION
            assert report["lazy"] == {}


@pytest.mark.parametrize("schedule", WAITS)
def test_no_more_bytes_are_held_ahead_than_stated(world: int, schedule: str) -> None:
    for report in stages(world, schedule, "one region ahead").values():
        assert report["ahead_bytes"] == (REGION if report["early"] else 0)
        if report["early"]:
            # the newest region, which the backward needs first; where that one is kept there is no room for another
            assert report["early"] == [row for row in report["replays"] if row[1] == "1 blocks.1"]
            assert report["lazy"] == {"more than 4000 bytes ahead": 2 * world}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_early_and_nothing_held_ahead_when_it_is_off(world: int, schedule: str) -> None:
    for report in stages(world, schedule, "lazy").values():
        assert (report["early"], report["ahead_bytes"], report["lazy"]) == ([], 0, {})


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_the_last_stage_replays_nothing_when_its_backward_comes_at_once(world: int, schedule: str) -> None:
    reports = stages(world, schedule, "early")
    last = reports.pop(max(reports))
    assert last["replays"] == []
    assert count(last["kept"]) == BLOCKS * 2 * world
    assert all(report["kept"] == [] for report in reports.values())


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_with_room_for_one_the_last_stage_keeps_its_final_region(world: int, schedule: str) -> None:
    reports = stages(world, schedule, "one region ahead")
    last = reports[max(reports)]
    assert {region for _, region, _ in last["kept"]} == {"1 blocks.1"}
    assert {region for _, region, _ in last["replays"]} == {"0 blocks.0"}


@pytest.mark.parametrize("mode", ["default", "lazy"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_kept_unless_ahead_has_room_for_it(world: int, schedule: str, mode: str) -> None:
    assert all(report["kept"] == [] for report in stages(world, schedule, mode).values())


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_by_default_the_newest_region_of_each_micro_batch_is_early_on_every_rank_but_the_last(
    world: int, schedule: str
) -> None:
    reports = stages(world, schedule, "default")
    assert reports.pop(max(reports))["early"] == []
    for report in reports.values():
        assert report["early"] == [[mb, "1 blocks.1", 1] for mb in range(2 * world)]
        assert report["ahead_bytes"] == REGION
        assert report["lazy"] == {
            "without ahead= only the newest region is early, which costs no memory": 2 * world
        }


def test_gpipe_keeps_nothing_since_its_first_backward_is_of_the_first_micro_batch(world: int) -> None:
    for mode in MODES:
        assert all(report["kept"] == [] for report in stages(world, "GPipe", mode).values())


def test_breadth_first_keeps_the_micro_batch_whose_backward_it_runs_first(world: int) -> None:
    for index, report in stages(world, "LoopedBFS", "early").items():
        kept = {mb for mb, _, _ in report["kept"]}
        assert kept == ({2 * world - 1} if index >= world else set())


@pytest.mark.parametrize("mode", ["early", "lazy"])
@pytest.mark.parametrize("schedule", SPLIT)
def test_between_the_halves_only_what_weights_need_is_held_and_counted(
    world: int, schedule: str, mode: str
) -> None:
    for index, report in stages(world, schedule, mode).items():
        if index > 0:
            waiting, rest = divmod(report["weight_bytes"], BLOCKS * FOR_WEIGHTS)
            assert rest == 0
            assert 1 <= waiting <= world
        else:  # the whole backward is its weight half
            assert report["weight_bytes"] == (BLOCKS * REGION if mode == "early" else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_halves_are_run_before_their_turn_only_where_values_would_pile_up(
    world: int, schedule: str, mode: str
) -> None:
    early = sum(report["weights_early"] for report in stages(world, schedule, mode).values())
    piles_up = world == 4 and schedule == "ZBVZeroBubble" and mode in ("default", "lazy")
    assert (early > 0) == piles_up


@pytest.mark.parametrize("schedule", SINGLE)
def test_a_whole_backward_leaves_nothing_for_weights(world: int, schedule: str) -> None:
    assert all(report["weight_bytes"] == 0 for report in stages(world, schedule, "early").values())
