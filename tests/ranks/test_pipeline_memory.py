"""Live bytes of a pipeline step, counted by the allocator."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.pipeline_memory import BLOCKS, COUNT
from tests.ranks.spawn import run_ranks

REGION = 197_120  # bytes that a block's replay makes


@pytest.fixture(scope="module")
def last() -> dict[str, Any]:
    """1F1B on one rank, which is the last stage."""
    return run_ranks("tests.ranks.jobs.pipeline_memory", 1)[0]


@pytest.mark.parametrize("mode", ["lazy", "default", "limited"])
def test_the_last_stage_costs_no_more_than_regions_alone(last: dict[str, Any], mode: str) -> None:
    kept = COUNT if mode == "limited" else 0  # the final region, for which this limit has room
    assert last[mode]["kept"] == kept
    assert last[mode]["replays"] == COUNT * BLOCKS - kept
    assert last[mode]["peak"] <= last["alone"]["peak"]


def test_keeping_every_region_costs_no_more_than_replaying_all_of_them_early(last: dict[str, Any]) -> None:
    assert last["early"]["replays"] == 0
    assert last["early"]["peak"] <= last["lazy"]["peak"] + (BLOCKS - 1) * REGION


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """The first of two ranks, which waits for gradients."""
    return run_ranks("tests.ranks.jobs.pipeline_memory", 2)[0]


def test_the_peak_grows_by_the_bytes_held_ahead_less_one_region(first: dict[str, Any]) -> None:
    assert first["early"]["ahead"] == BLOCKS * REGION
    assert first["lazy"]["ahead"] == 0
    # without early replay one region's values exist at a time, and not all of them at its highest moment
    more = first["early"]["peak"] - first["lazy"]["peak"]
    assert (BLOCKS - 2) * REGION < more < BLOCKS * REGION


def test_room_for_one_region_costs_no_memory(first: dict[str, Any]) -> None:
    for mode in ("limited", "default"):
        assert first[mode]["ahead"] == REGION
        assert first[mode]["peak"] == first["lazy"]["peak"]
