"""Watch mode on two real ranks: collectives inside replays, compared before they go out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from distckpt.ranks.watchdog import _first_difference, _judge_end
from tests.ranks.spawn import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.ranks.jobs.watch", 2)


@pytest.mark.parametrize(
    ("case", "compared"),
    [
        ("same order", 2),
        ("same order, compared at the end", 2),
        ("after all errors", 2),
        ("no region", 0),
    ],
)
def test_ranks_in_one_order_pass_with_gradients_of_no_checkpointing(
    ranks: Any, case: str, compared: int
) -> None:
    for rank in ranks:
        assert rank[case]["result"] is None
        assert rank[case]["compared"] == compared
        assert rank[case]["grad"] == rank["reference"]


def test_regions_that_have_died_are_not_counted_again(ranks: Any) -> None:
    for rank in ranks:
        assert rank["three at a time"]["result"] is None
        assert rank["three at a time"]["compared"] == 4


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        (
            "B before A",
            "rank 0: allreduce_(float32[4]) on group 0 in region block #0",
            "rank 1: all_gather_into_tensor(float32[4]) on group 0 in region other #1",
        ),
        (
            "equal collectives of swapped regions",
            "rank 0: allreduce_(float32[4]) on group 0 in region block #0",
            "rank 1: allreduce_(float32[4]) on group 0 in region block #1",
        ),
        (
            "groups swapped",
            "rank 0: allreduce_(float32[4]) on group 0 in region block #0",
            "rank 1: allreduce_(float32[4]) on group 1 in region block #1",
        ),
    ],
)
def test_the_first_difference_is_named_on_every_rank_before_the_collective_goes_out(
    ranks: Any, case: str, first: str, second: str
) -> None:
    for rank in ranks:
        assert rank[case]["result"]["class"] == "CollectivesDiffer"
        assert rank[case]["result"]["code"] == "DC412"
        assert "collective 1 inside replays is not the same on ranks 0-1" in rank[case]["result"]["text"]
        assert first in rank[case]["result"]["text"]
        assert second in rank[case]["result"]["text"]
        assert rank[case]["grad"] is None  # no replay went on with the other's data


def test_with_a_longer_interval_the_difference_shows_at_the_end_and_the_data_is_mixed_until_then(
    ranks: Any,
) -> None:
    for rank in ranks:
        said = rank["seen at the end"]
        assert said["result"]["class"] == "CollectivesDiffer"
        assert said["grad"] is not None


def test_sharded_units_inside_regions_run_undisturbed_and_their_replays_gather_nothing(ranks: Any) -> None:
    for rank in ranks:
        assert rank["sharded units inside regions"]["result"] is None
        assert rank["sharded units inside regions"]["grad"] is not None
        assert rank["sharded units inside regions"]["compared"] == 0


def test_collectives_that_tensor_parallel_layers_issue_below_dtensor_are_compared(ranks: Any) -> None:
    for rank in ranks:
        assert rank["tensor parallel"]["result"] is None
        assert rank["tensor parallel"]["compared"] == 2
        text = rank["tensor parallel, swapped"]["result"]["text"]
        assert "[DC412]" in text
        assert "rank 0: all_reduce(float32[4]) on group" in text
        assert "in region Sequential #0" in text
        assert "in region Sequential #1" in text


def test_a_group_of_one_rank_has_nothing_to_compare(ranks: Any) -> None:
    for rank in ranks:
        assert rank["a group of one rank"]["result"] is None
        assert rank["a group of one rank"]["compared"] == 0


def test_a_rank_that_does_not_replay_is_named_after_the_timeout(ranks: Any) -> None:
    here, there = (rank["one rank does not replay"]["result"] for rank in ranks)
    assert here["class"] == there["class"] == "RanksMissing"
    assert "rank 1 did not come to collective 1 inside replays of ranks 0-1, allreduce_" in here["text"]
    assert "rank 0 did not come to the end of a watch" in there["text"]


def test_a_mode_entered_around_the_backward_sees_replays_on_autograds_device_threads_too() -> None:
    (said,) = run_ranks("tests.ranks.jobs.device_thread", 1)
    if said is None:
        pytest.skip(
            f"torch {torch.__version__} has no device type in pure Python that has a thread of its own"
        )
    assert said == {"threads": ["autograd's"], "ops": ["detach", "sin", "exp"]}


A, B = ["all_reduce", "group 0", "region a #0"], ["all_reduce", "group 0", "region b #1"]


def test_a_rank_with_fewer_collectives_differs_where_its_list_ends() -> None:
    verdict = _first_difference({0: (2, [A, B]), 1: (2, [A]), 2: (2, [A, B])})
    assert verdict.error is not None
    assert verdict.error["what"] == "collective 4 inside replays is not the same on ranks 0-2"
    assert "rank 1: none" in verdict.error["where"]


def test_equal_lists_do_not_differ() -> None:
    assert _first_difference({0: (5, [A, B]), 3: (5, [A, B])}).error is None


def test_at_the_end_a_rank_that_saw_nothing_of_a_group_differs_from_its_others() -> None:
    messages = {0: json.dumps([[[0, 1], 0, [A]]]), 1: json.dumps([]), 2: json.dumps([])}
    verdict = _judge_end({rank: text.encode() for rank, text in messages.items()}, {})
    assert verdict.error is not None
    assert "rank 1: none" in verdict.error["where"]
    assert "rank 2" not in verdict.error["where"]
