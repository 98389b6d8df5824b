"""Regions and FSDP2 units on two ranks: bit-equal gradients, and not one collective more, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distckpt._torch_dist import UNITS_IN_REPLAYS
from tests.ranks.jobs.fsdp2 import CASES, NEEDS_UNITS_IN_REPLAYS
from tests.ranks.spawn import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
MANY = ("flat", "reshard", "keep", "bf16", "accumulate", "two forwards", "prefetch")
PAIRS = [
    *((case, way) for case in CASES for way in ("coord", "before", "after")),
    *((case, way) for case in MANY for way in ("wrapper_outside", "composable", "call", "call_two")),
    *((case, "wrapper_inside") for case in MANY if case != "prefetch"),
    *(
        (case, way)
        for case in ("nested", "nested prefetch")
        for way in ("wrapper_outside", "composable", "call")
    ),
    ("override", "coord"),
]
COARSE = [case for case in CASES if case.startswith("coarser")]


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks("tests.ranks.jobs.fsdp2", 2)


def of(ranks: list[Any], case: str, way: str) -> list[dict[str, Any]]:
    if not UNITS_IN_REPLAYS and (case in NEEDS_UNITS_IN_REPLAYS or way == "call_two"):
        pytest.skip("this torch gathers units inside a region again in each replay")
    return [rank[case][way] for rank in ranks]


def gathers(calls: list[Any], phase: str) -> int:
    """All-gathers in the first step's first such phase."""
    first = next(sent for name, sent in calls if name == phase)
    return sum("allgather" in name for name, _ in first)


def gathered(calls: list[Any]) -> list[int]:
    """The sizes of what the first backward gathers, in order."""
    return [
        size for name, size in next(sent for phase, sent in calls if phase == "backward") if "gather" in name
    ]


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_gradients_and_parameters_are_equal_to_the_bit(ranks: list[Any], case: str, way: str) -> None:
    for found in of(ranks, case, way):
        assert found["equal"]
        assert found["finite"]
        assert found["replays"]


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_every_collective_is_the_same_and_in_the_same_order(ranks: list[Any], case: str, way: str) -> None:
    for found in of(ranks, case, way):
        assert found["same calls"]
        assert found["same order"] or case in COARSE


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_after_a_backward_every_unit_is_sharded_idle_and_waits_for_nothing(
    ranks: list[Any], case: str, way: str
) -> None:
    for found in of(ranks, case, way):
        assert found["left"] == []


@pytest.mark.parametrize("way", ["coord", "before", "after"])
@pytest.mark.parametrize(
    ("case", "forward", "backward", "replays"),
    [  # four layers and the root: all-gathers of one step, replays of two steps
        ("flat", 5, 4, 8),
        ("reshard", 5, 5, 8),
        ("keep", 5, 0, 8),
        ("grouped", 6, 5, 12),
        ("finer", 5, 4, 16),
        ("nested regions", 5, 4, 16),
        ("frozen below", 5, 2, 2),
        ("nested", 13, 12, 8),
        ("nested keep", 13, 0, 8),
        ("nested prefetch", 13, 12, 8),
        ("coarser", 5, 4, 2),
    ],
)
def test_the_counts_are_these(
    ranks: list[Any], case: str, way: str, forward: int, backward: int, replays: int
) -> None:
    for found in of(ranks, case, way):
        for calls in (found["calls"], found["plain calls"]):
            assert (gathers(calls, "forward"), gathers(calls, "backward")) == (forward, backward)
        assert found["replays"] == replays


def test_an_override_reaches_its_unit_alone(ranks: list[Any]) -> None:
    for found in of(ranks, "override", "coord"):
        assert (gathers(found["calls"], "forward"), gathers(found["calls"], "backward")) == (5, 3)


def test_reduce_scatters_wait_for_the_last_micro_batch(ranks: list[Any]) -> None:
    for found in of(ranks, "accumulate", "coord"):
        sent = [sum("reduce_scatter" in name for name, _ in calls) for _, calls in found["calls"]]
        assert sent == [0, 0, 0, 5] * 2  # forward, backward, forward, backward


def test_units_inside_a_region_are_gathered_when_its_replay_meets_them(ranks: list[Any]) -> None:
    for found in of(ranks, "coarser", "coord"):
        fourth, third, second, first = gathered(found["plain calls"])
        assert fourth > third > second > first  # the layers grow
        # The last layer's backward gathers it and prefetches one; then the replay runs from the first.
        assert gathered(found["calls"]) == [fourth, third, first, second]


def test_without_the_guard_a_replay_prefetches_in_forward_order_for_nothing(ranks: list[Any]) -> None:
    # What the guard is for; should torch mend it one day, the guard can go.
    for found in of(ranks, "nested prefetch", "unguarded"):
        assert gathers(found["calls"], "backward") > gathers(found["plain calls"], "backward") == 12
        assert found["equal"]
