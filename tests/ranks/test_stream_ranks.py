"""Named streams over real ranks, and their states in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.spawn import run_ranks

# dp by tp; the mesh of the job numbers the ranks like this
MESH = [[3, 1], [0, 2]]
PLACES = {rank: (dp, tp) for dp, row in enumerate(MESH) for tp, rank in enumerate(row)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[Any]:
    return run_ranks("tests.ranks.jobs.streams", 4, str(folder))


@pytest.fixture(scope="module")
def two(folder: Path, four: list[Any]) -> list[Any]:
    return run_ranks("tests.ranks.jobs.streams_load", 2, str(folder), "four")


@pytest.fixture(scope="module")
def three(folder: Path, two: list[Any]) -> list[Any]:
    return run_ranks("tests.ranks.jobs.streams_load", 3, str(folder), "from-2")


def test_ranks_draw_equal_or_different_numbers_as_the_names_promise(four: list[Any]) -> None:
    for a in range(4):
        for b in range(a):
            (dp_a, tp_a), (dp_b, _) = PLACES[a], PLACES[b]
            first, second = four[a]["first"], four[b]["first"]
            assert four[a]["at"] == [dp_a, tp_a]
            assert (first["data-parallel"] == second["data-parallel"]) == (dp_a == dp_b)
            assert (first["context-parallel"] == second["context-parallel"]) == (dp_a == dp_b)
            for name in ("tensor-parallel", "expert-parallel", "default"):
                assert first[name] != second[name]


def test_the_self_test_says_which_ranks_draw_the_same(four: list[Any]) -> None:
    for found in four:
        assert found["checked"] == {
            "context-parallel": [[0, 2], [1, 3]],
            "data-parallel": [[0, 2], [1, 3]],
            "expert-parallel": [[0], [1], [2], [3]],
            "tensor-parallel": [[0], [1], [2], [3]],
        }


def test_the_self_test_names_a_rank_that_drew_more_often_on_every_rank(four: list[Any]) -> None:
    for found in four:
        assert found["drifted"].startswith(
            "[DC453] stream 'data-parallel' draws other numbers on rank 3 than on rank 1 (cpu)"
        )
        assert "dp=0" in found["drifted"]


def test_the_self_test_names_ranks_that_draw_the_same_and_should_not(four: list[Any]) -> None:
    for found in four:
        assert found["reseeded"].startswith(
            "[DC453] stream 'tensor-parallel' draws the same numbers on rank 0 and on rank 1 (cpu)"
        )


def test_the_self_test_names_a_rank_with_another_seed_or_table(four: list[Any]) -> None:
    for found in four:
        assert "with another seed on rank 2 (4) than on rank 0 (3)" in found["other seed"]
        assert "rank 3 has other random streams than rank 0" in found["other table"]


def test_every_rank_gets_its_own_states_back_from_a_checkpoint(four: list[Any]) -> None:
    assert [found["restored"] for found in four] == [True] * 4
    upcoming = [found["next"] for found in four]
    for name in ("default", "tensor-parallel", "expert-parallel"):
        assert len({tuple(found[name]) for found in upcoming}) == 4


def test_the_saved_value_is_the_same_on_every_rank(four: list[Any]) -> None:
    assert [found["equal on all ranks"] for found in four] == [True] * 4
    assert four[0]["value"] == {"version": 2, "world": 4}


@pytest.mark.parametrize(("job", "was", "now"), [("two", 4, 2), ("three", 2, 3)])
def test_states_of_another_number_of_ranks_are_refused_with_the_reason(
    request: pytest.FixtureRequest, job: str, was: int, now: int
) -> None:
    ranks = request.getfixturevalue(job)
    assert len(ranks) == now
    for found in ranks:
        assert f"[DC455] the random states are of {was} ranks, and this job has {now}" in found["refused"]
        assert found["untouched"]


def test_on_fewer_ranks_streams_continue_by_mesh_coordinate_when_asked_to(
    four: list[Any], two: list[Any]
) -> None:
    for rank, found in enumerate(two):
        then = four[MESH[0][rank]]["next"]  # who stood at dp=0, tp=rank
        for name in ("data-parallel", "context-parallel", "tensor-parallel", "expert-parallel"):
            assert found["next"][name] == then[name]
        assert found["next"]["default"] == four[rank]["next"]["default"]  # this goes by rank


def test_on_more_ranks_the_new_ones_begin_at_their_seed(four: list[Any], three: list[Any]) -> None:
    first = {name: numbers for name, numbers in three[2]["next"].items() if name != "default"}
    assert three[2]["at"] == [0, 2]
    assert first["data-parallel"] == three[0]["next"]["data-parallel"]  # equal over tp, so it continues
    drawn = [tuple(found["next"]["tensor-parallel"]) for found in three]
    assert len(set(drawn)) == 3
