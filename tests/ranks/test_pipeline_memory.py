"""Live bytes of a pipeline step, counted by the allocator."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.pipeline_memory import BLOCKS, COUNT, ROWS, WIDTH
from tests.ranks.spawn import run_ranks

REGION = 197_120  # bytes that a block's replay makes


@pytest.fixture(scope="module")
def last() -> dict[str, Any]:
    """1F1B on one rank, which is the last stage."""
    return run_ranks("tests.ranks.jobs.pipeline_memory", 1)[0]


def test_keeping_the_only_region_of_the_last_stage_saves_every_replay_for_less_than_one_output(
    last: dict[str, Any],
) -> None:
    alone, kept = last["one block, alone"], last["one block, lazy"]
    assert kept["replays"] == 0
    assert kept["kept"] == COUNT
    # what the loss saves lives beside the region's values, which a replay would make when the loss is done
    assert kept["peak"] - alone["peak"] < ROWS * WIDTH * 4


@pytest.mark.parametrize("mode", ["lazy", "limited"])
def test_keeping_the_final_region_costs_no_memory(last: dict[str, Any], mode: str) -> None:
    assert last[mode]["kept"] == COUNT
    assert last[mode]["replays"] == COUNT * (BLOCKS - 1)
    assert last[mode]["peak"] <= last["alone"]["peak"]


def test_keeping_every_region_costs_no_more_than_replaying_all_of_them_early(last: dict[str, Any]) -> None:
    assert last["early"]["replays"] == 0
    assert last["early"]["peak"] <= last["lazy"]["peak"] + (BLOCKS - 1) * REGION


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """The first of two ranks, which waits for gradients."""
    return run_ranks("tests.ranks.jobs.pipeline_memory", 2)[0]


def test_the_bytes_held_ahead_are_what_the_peak_grows_by(first: dict[str, Any]) -> None:
    assert first["early"]["ahead"] == BLOCKS * REGION
    assert first["lazy"]["ahead"] == 0
    # without early replay one region's values exist at a time
    assert first["early"]["peak"] - first["lazy"]["peak"] == (BLOCKS - 1) * REGION


def test_room_for_one_region_costs_no_memory(first: dict[str, Any]) -> None:
    assert first["limited"]["ahead"] == REGION
    assert first["limited"]["peak"] == first["lazy"]["peak"]
