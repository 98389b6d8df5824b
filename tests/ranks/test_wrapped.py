"""Regions with FSDP1 and DDP on two ranks: bit-equal gradients and the same collectives, inside and outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks.jobs.wrapped import DDP_CASES, FSDP1_CASES, ddp_ways, fsdp1_ways
from tests.ranks.spawn import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
PAIRS = [
    *((f"fsdp1, {case}", way) for case in FSDP1_CASES for way in fsdp1_ways({}) if "unguarded" not in way),
    *((f"ddp, {case}", way) for case in DDP_CASES for way in ddp_ways(torch.nn.Module, {}) if way != "none"),
]


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks("tests.ranks.jobs.wrapped", 2)


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_gradients_are_equal_to_the_bit_and_every_collective_is_the_same(
    ranks: list[Any], case: str, way: str
) -> None:
    for found in (rank[case][way] for rank in ranks):
        assert found["equal"]
        assert found["finite"]
        assert found["same calls"]
        assert found["same order"] or way == "coarser"  # a replay gathers from the first unit on
        assert found["replays"]


def names(calls: list[Any], index: int) -> list[str]:
    return [name for name, _ in calls[index][1]]


@pytest.mark.parametrize(("case", "backward"), [("full", 4), ("grad op", 0), ("prefetch", 4)])
def test_fsdp1_gathers_each_unit_as_often_as_without_regions(
    ranks: list[Any], case: str, backward: int
) -> None:
    for found in (rank[f"fsdp1, {case}"]["outside"] for rank in ranks):
        assert names(found["calls"], 0).count("allgather_") == 5
        assert names(found["calls"], 1).count("allgather_") == backward


@pytest.mark.parametrize("way", ["before", "after", "whole"])
def test_ddp_reduces_each_bucket_once(ranks: list[Any], way: str) -> None:
    for rank in ranks:
        assert names(rank["ddp, plain"][way]["calls"], 1) == ["allreduce_"]
        assert names(rank["ddp, no_sync"][way]["calls"], 1) == []
        assert names(rank["ddp, no_sync"][way]["calls"], 3) == ["allreduce_"]
        assert names(rank["ddp, small buckets"][way]["calls"], 3) == ["allreduce_"] * 6


def test_a_block_that_a_step_skips_is_not_replayed_in_it(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["ddp, unused"]["before"]["replays"] == 3 + 2


def test_fsdp1_without_the_guard_gathers_a_unit_inside_a_region_once_more(ranks: list[Any]) -> None:
    for found in (rank["fsdp1, full"]["call two, unguarded"] for rank in ranks):
        assert found["equal"]
        assert names(found["plain calls"], 1).count("allgather_") == 4
        assert names(found["calls"], 1).count("allgather_") == 6
