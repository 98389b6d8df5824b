"""State dicts with regions on: the same keys, and a checkpoint that any number of ranks resumes to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks.spawn import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    path = str(tmp_path_factory.mktemp("checkpoint"))
    return path, run_ranks("tests.ranks.jobs.fsdp2_resume", 2, "save", path)


def test_regions_change_no_key_and_no_shard_of_a_state_dict(saved: tuple[str, list[Any]]) -> None:
    for rank in saved[1]:
        assert rank["keys"]
        assert rank["own keys"]
        assert rank["local"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_another_number_of_ranks_resumes_parameters_and_optimizer_to_the_bit(
    saved: tuple[str, list[Any]], world: int
) -> None:
    path, ranks = saved
    first = run_ranks("tests.ranks.jobs.fsdp2_resume", world, "load", path)[0]
    assert first["regions"]["loaded"] == first["none"]["loaded"] == ranks[0]["at save"]
    assert first["regions"]["one step on"] == first["none"]["one step on"]
    assert (first["regions"]["one step on"] == ranks[0]["one step on"]) == (world == 2)
