"""Tensor- and sequence-parallel blocks in regions on two real ranks, dropout in named streams."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.spawn import run_ranks

KINDS = ["tensor parallel", "sequence parallel", "linear last", "hidden as dtensor"]


@pytest.fixture(scope="module")
def two() -> list[Any]:
    return run_ranks("tests.ranks.jobs.tensor_parallel", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_outputs_and_streams_are_those_without_regions(two: list[Any], kind: str) -> None:
    for found in two:
        assert found[kind]["dc"]["equal"]
        assert found[kind]["dc"]["replays"] == 3
        assert found[kind]["dc"]["checked"] == 4  # the streams still agree over the ranks


@pytest.mark.parametrize("kind", ["tensor parallel", "linear last", "hidden as dtensor"])
def test_partitioned_inputs_change_no_bit(two: list[Any], kind: str) -> None:
    for found in two:
        row = found[kind]["partition"]
        assert row["equal"]
        assert (row["replays"], row["gathers"], row["prefetched"]) == (3, 3, 2)


@pytest.mark.parametrize(
    ("kind", "plain", "regions"),
    [
        ("tensor parallel", 6, 9),
        ("sequence parallel", 12, 18),
        ("linear last", 6, 6),
        ("hidden as dtensor", 6, 9),
    ],
)
def test_a_replay_repeats_no_collective_that_torchs_does_not(
    two: list[Any], kind: str, plain: int, regions: int
) -> None:
    for found in two:
        assert found[kind]["plain"]["all"] == plain
        assert found[kind]["dc"]["all"] == found[kind]["torch"]["all"] == regions


def test_partitioning_adds_one_gather_per_region_and_one_check_per_module(two: list[Any]) -> None:
    for found in two:
        row = found["tensor parallel"]
        assert row["partition"]["all"] == row["dc"]["all"] + 3 + 3


def test_values_that_are_whole_over_the_ranks_stay_equal_and_split_ones_differ(two: list[Any]) -> None:
    first, second = two
    for kind in ("tensor parallel", "hidden as dtensor"):
        assert first[kind]["out"] == second[kind]["out"]
    assert first["sequence parallel"]["out"] != second["sequence parallel"]["out"]
