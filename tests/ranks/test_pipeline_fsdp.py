"""FSDP2 inside pipeline stages: 2 stages' ranks by 2 replicas."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.spawn import run_ranks

CASES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "sharded again", "around units")


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run_ranks("tests.ranks.jobs.pipeline_fsdp", 4)


def reports(found: list[Any], case: str) -> list[dict[str, Any]]:
    return [report for rank in found for report in rank[case]["report"].values()]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_without_regions(found: list[Any], case: str) -> None:
    assert [rank[case]["equal"] for rank in found] == [True] * 4


@pytest.mark.parametrize("case", CASES)
def test_a_region_is_replayed_once(found: list[Any], case: str) -> None:
    for report in reports(found, case):
        assert all(n == 1 for *_, n in report["replays"] + report["kept"])


@pytest.mark.parametrize("case", ["1F1B", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_gathered_units_are_replayed_early(found: list[Any], case: str) -> None:
    for rank in found[:2]:  # the ranks of the first stages
        for report in rank[case]["report"].values():
            assert report["early"] == report["replays"]
            assert report["lazy"] == {}


def test_a_region_in_a_sharded_unit_waits_for_its_gradient_and_says_why(found: list[Any]) -> None:
    for rank in found[:2]:
        report = rank["sharded again"]["report"]["0"]
        # the first backward gathers, and the pipeline keeps the units gathered from then on
        late = [row for row in report["replays"] if row not in report["early"]]
        assert {mb for mb, _, _ in late} == {0}
        assert report["lazy"] == {
            "the sharded unit 'blocks.1' would gather outside of a backward": 1,
            "the sharded unit 'blocks.0' would gather outside of a backward": 1,
        }


def test_a_region_that_calls_sharded_units_is_never_early_and_says_why(found: list[Any]) -> None:
    for rank in found[:2]:
        report = rank["around units"]["report"]["0"]
        assert report["early"] == []
        assert report["lazy"] == {
            "it calls the sharded unit 'part.blocks.0' which would gather outside of a backward": 4
        }
