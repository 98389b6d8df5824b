"""Regions and FSDP2 units on four ranks: replicas of shards (HSDP), and resharding to a smaller group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distckpt._torch_dist import UNITS_IN_REPLAYS
from tests.ranks.spawn import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks("tests.ranks.jobs.fsdp2_four", 4)


@pytest.mark.parametrize(
    ("case", "gathers", "reduced"),
    [  # of one step, both phases; all-reduces between the replicas, one for each unit
        ("hsdp", 4 + 3, 4),
        ("hsdp, nested", 10 + 9, 10),
        ("reshard to two", 4 + 4, 0),
        ("reshard to two, nested", 10 + 10, 0),
    ],
)
def test_gradients_are_equal_to_the_bit_and_so_are_the_collectives(
    ranks: list[Any], case: str, gathers: int, reduced: int
) -> None:
    if "nested" in case and not UNITS_IN_REPLAYS:
        pytest.skip("this torch gathers units inside a region again in each replay")
    for found in (rank[case] for rank in ranks):
        assert found["equal"]
        assert found["finite"]
        assert found["same order"]
        assert found["left"] == []
        assert found["replays"] == 6
        step = [name for _, sent in found["calls"][:2] for name, _ in sent]
        assert sum("allgather" in name for name in step) == gathers
        assert sum("allreduce" in name for name in step) == reduced


def test_units_over_one_dimension_and_tensor_parallel_layers_over_the_other(ranks: list[Any]) -> None:
    for found in (rank["tensor parallel"] for rank in ranks):
        assert found["equal"]
        assert found["finite"]
        assert found["left"] == []
        for calls in (
            found["calls"],
            found["plain calls"],
        ):  # a replay runs the layers' own collectives again
            assert sum(name == "_allgather_base_" for _, sent in calls[:2] for name, _ in sent) == 4 + 3
