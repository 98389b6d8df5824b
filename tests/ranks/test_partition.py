"""Partitioned inputs on two and three real ranks: exact, and counted to the byte."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.ranks.spawn import run_ranks


@pytest.fixture(scope="module")
def two() -> list[Any]:
    return run_ranks("tests.ranks.jobs.partition", 2)


@pytest.fixture(scope="module")
def three() -> list[Any]:
    return run_ranks("tests.ranks.jobs.partition", 3)


@pytest.fixture(params=["two", "three"])
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    return request.getfixturevalue(request.param)


def chunk(nbytes: int, world: int) -> int:
    """A rank's part of so many bytes, in steps of 16."""
    return math.ceil(nbytes / (world * 16)) * 16


def counted(**expected: int) -> dict[str, int]:
    names = ("regions", "tensors", "whole", "kept", "gathers", "prefetched", "dropped", "checks")
    return {name: expected.get(name, 0) for name in names}


def test_a_rank_keeps_its_part_and_each_replay_gathers_once_all_but_the_first_ahead(ranks: list[Any]) -> None:
    region = 1024 * 256 * 4
    sizes = {"whole": 4 * region, "kept": 4 * chunk(region, len(ranks))}
    assert sizes["kept"] == {2: 2097152, 3: 1398144}[len(ranks)]
    for found in ranks:
        ahead, lazy = found["chain"]
        common = counted(regions=4, tensors=4, gathers=4, checks=1, **sizes)
        assert ahead == {"equal": True, "replays": 4, **common, "prefetched": 3}
        assert lazy == {"equal": True, "replays": 4, **common}


def test_sizes_that_do_not_divide_are_padded(ranks: list[Any]) -> None:
    for found in ranks:
        for nbytes, row in zip((4, 28, 260, 12012), found["odd_sizes"], strict=True):
            sizes = {"whole": nbytes, "kept": chunk(nbytes, len(ranks))}
            assert row == {
                "equal": True,
                "replays": 1,
                **counted(regions=1, tensors=1, gathers=1, checks=1, **sizes),
            }


def test_the_replay_sees_the_same_strides_gaps_alignment_and_values(ranks: list[Any]) -> None:
    for found in ranks:
        layouts = dict(found["layouts"])
        assert layouts.pop("overlapping is kept whole") == 1
        assert len(layouts) == 10
        assert all(row == [True, 2, 2] for row in layouts.values()), layouts


def test_inputs_that_differ_over_the_ranks_are_named_on_every_rank(ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        checks = found["checks"]
        assert (
            "[DC461] input 1 of a region, torch.float32 of shape (64,), has other values on rank 1"
            in checks["values"]
        )
        assert checks["again"] == checks["values"]
        for name in ("form", "number", "none here"):
            assert "have another form on rank 1 than on rank 0" in checks[name], (rank, name)


def test_inputs_that_differ_are_left_alone_when_asked_to(ranks: list[Any]) -> None:
    for found in ranks:
        sizes = {"whole": 256, "kept": chunk(256, len(ranks))}
        exact, counts = found["checks"]["left alone"]
        assert exact
        assert counts == counted(regions=1, tensors=1, gathers=1, checks=2, **sizes)


def test_digests_travel_once_per_form_always_or_never(ranks: list[Any]) -> None:
    for found in ranks:
        for check in ("first", "always", "never"):
            made, expected = found["checks"][check]
            assert made == expected


def test_any_dtype_comes_back_to_the_bit(two: list[Any]) -> None:
    for found in two:
        assert len(found["dtypes"]) == 9
        assert all(found["dtypes"].values())


def test_a_tensor_passed_several_times_is_kept_once_and_is_one_object_again(two: list[Any]) -> None:
    for found in two:
        row, seen = found["same_twice"]
        assert row == {
            "equal": True,
            "replays": 1,
            **counted(regions=1, tensors=1, whole=160, kept=80, gathers=1, checks=1),
        }
        assert seen == [True, True, True]


def test_keywords_containers_and_partials_share_one_gather(two: list[Any]) -> None:
    # Four tensors of 120 bytes, each at a multiple of 64: 504 bytes from the first to the last.
    for found in two:
        assert found["containers"] == {
            "equal": True,
            "replays": 1,
            **counted(regions=1, tensors=4, whole=480, kept=chunk(504, 2), gathers=1, checks=1),
        }


def test_small_tensors_parameters_and_sharded_dtensors_stay_whole(two: list[Any]) -> None:
    for found in two:
        assert found["small_and_parameters"] == counted(
            regions=1, tensors=1, whole=400, kept=208, gathers=1, checks=1
        )


def test_a_replicated_dtensor_is_divided_and_a_dtensor_again(two: list[Any]) -> None:
    # Three tensors of 240 bytes, each at a multiple of 64.
    for found in two:
        row, seen, sharded = found["replicated"]
        assert row == {
            "equal": True,
            "replays": 1,
            **counted(regions=1, tensors=3, whole=720, kept=chunk(752, 2), gathers=1, checks=1),
        }
        assert seen == [["DTensor", True, False]] * 3  # plain, recorded, replayed
        assert sharded == 1  # the other input only


def test_nested_regions_are_exact_and_gather_once_per_replay(two: list[Any]) -> None:
    # Two outer regions and four inner ones, whose records the outer replays repeat.
    for found in two:
        row = found["nested"]
        assert row["equal"]
        assert (row["replays"], row["gathers"], row["regions"]) == (6, 6, 10)


def test_two_backwards_gather_twice(two: list[Any]) -> None:
    for found in two:
        assert found["retained"] == {
            "equal": True,
            "replays": 4,
            **counted(regions=2, tensors=2, whole=512, kept=256, gathers=4, prefetched=2, checks=1),
        }


def test_a_gather_that_no_replay_takes_is_dropped_with_its_backward(two: list[Any]) -> None:
    common = {"regions": 2, "tensors": 2, "whole": 512, "kept": 256, "checks": 1}
    for found in two:
        first, second, gradients = found["partial_backward"]
        assert first == counted(**common, gathers=2, dropped=1)
        assert second == counted(**common, gathers=3, dropped=1)
        assert gradients == 2


def test_replays_fired_early_gather_without_looking_ahead(two: list[Any]) -> None:
    for found in two:
        replayed, exact, counts = found["session"]
        assert (replayed, exact) == (2, True)
        assert counts == counted(regions=2, tensors=2, whole=512, kept=256, gathers=2, checks=1)


def test_the_input_itself_does_not_outlive_the_forward(two: list[Any]) -> None:
    for found in two:
        freed, again, counts = found["memory"]
        assert freed
        assert again  # nor the gathered one the replay, though the graph is still there
        assert counts == counted(regions=1, tensors=1, whole=16384, kept=8192, gathers=1, checks=1)


def test_saved_tensor_hooks_see_the_part_of_this_rank(two: list[Any]) -> None:
    for found in two:
        row, sizes = found["hooks"]
        assert row["equal"]
        assert (row["gathers"], row["prefetched"]) == (2, 0)
        assert sizes == [128, 128]


def test_an_input_that_was_changed_in_place_is_refused_before_the_gather(two: list[Any]) -> None:
    for found in two:
        message, counts = found["changed_in_place"]
        assert message.startswith("[DC111] partitioned input 0 of a region was changed in place")
        assert counts["gathers"] == 0


def test_a_replay_that_failed_between_its_inputs_can_be_repeated(two: list[Any]) -> None:
    for found in two:
        _, exact, counts = found["after_a_failure"]
        assert exact
        assert counts["gathers"] == 2


def test_ranks_that_replay_different_regions_are_told_so(two: list[Any]) -> None:
    for rank, found in enumerate(two):
        other = 1 - rank
        for message in found["other_region"].values():
            assert message.startswith(
                f"[DC462] rank {other} gathered the inputs of region {other} of the partition, "
                f"while rank {rank} replays region {rank}"
            )


def test_bad_groups_and_options_are_refused_and_a_group_of_one_divides_nothing(two: list[Any]) -> None:
    for rank, found in enumerate(two):
        options = dict(found["options"])
        assert options.pop("alone") == counted()
        if rank == 0:
            assert options.pop("not in it") == "nothing was raised"
        assert all(message.startswith("[DC460]") for message in options.values()), options


def test_module_regions_take_the_option_and_copies_keep_it(two: list[Any]) -> None:
    for found in two:
        exact, twin, counts = found["module_regions"]
        assert exact
        assert twin
        assert counts == counted(regions=6, tensors=6, whole=768, kept=384, gathers=6, prefetched=4, checks=6)
