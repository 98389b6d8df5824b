"""Who started this process, and whether what runs agrees."""

from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import pytest

from distckpt.errors import WorldChanged, WorldMismatch
from distckpt.ranks.world import Runtime, World, detect, runtime

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_nothing_in_the_environment_and_no_group_is_a_world_of_one() -> None:
    assert detect({}, lambda: None) == World(0, 1, 0, "alone", 0)


def test_torchrun_is_known_by_its_environment_restarts_included() -> None:
    assert detect(TORCHRUN, lambda: None) == World(5, 8, 1, "torchrun", 2, "job")


def test_rank_and_world_size_alone_are_an_environment_made_by_others() -> None:
    found = detect({"RANK": "1", "WORLD_SIZE": "2"}, lambda: Runtime("torch.distributed", 1, 2))
    assert (found.launcher, found.rank, found.size, found.local_rank) == ("environment", 1, 2, 1)


def test_a_group_without_a_launcher_says_who_we_are() -> None:
    found = detect({}, lambda: Runtime("torch.distributed", 1, 4))
    assert (found.launcher, found.rank, found.size) == ("process group", 1, 4)


def test_torch_xla_launch_is_known_by_its_runtime_or_by_its_environment() -> None:
    assert detect({}, lambda: Runtime("torch_xla", 3, 4)).launcher == "torch_xla.launch"
    launched = {"PJRT_LOCAL_PROCESS_RANK": "1", "PJRT_LOCAL_PROCESS_COUNT": "4"}
    found = detect(launched, lambda: Runtime("torch.distributed", 5, 8))
    assert (found.launcher, found.rank, found.local_rank) == ("torch_xla.launch", 5, 1)


@pytest.mark.parametrize("found", [(0, 1), (0, 8), (5, 4)])
def test_a_group_that_contradicts_the_launcher_is_refused(found: tuple[int, int]) -> None:
    # (0, 1) is what init_method="xla://" gives every process under torchrun with PJRT_DEVICE=CPU
    with pytest.raises(WorldMismatch) as caught:
        detect(TORCHRUN, lambda: Runtime("torch.distributed", *found))
    assert (
        f"torchrun started rank 5 of 8, but torch.distributed runs as rank {found[0]} of {found[1]}"
        in str(caught.value)
    )


def test_a_group_that_agrees_is_accepted() -> None:
    assert detect(TORCHRUN, lambda: Runtime("torch.distributed", 5, 8)).size == 8


def test_torch_xla_alone_does_not_contradict_a_launcher() -> None:
    # before init_process_group it says rank 0 of 1 on every platform
    assert detect(TORCHRUN, lambda: Runtime("torch_xla", 0, 1)).size == 8


def test_a_torch_xla_that_is_imported_but_not_used_is_not_initialised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never() -> int:
        raise AssertionError("asked a runtime that does not run")

    fake = SimpleNamespace(_XLAC=SimpleNamespace(_xla_runtime_is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    monkeypatch.setitem(
        sys.modules, "torch_xla.runtime", SimpleNamespace(global_ordinal=never, world_size=never)
    )
    assert runtime() is None


@pytest.mark.parametrize(("spmd", "expected"), [(False, Runtime("torch_xla", 1, 2)), (True, None)])
def test_a_running_torch_xla_is_asked_except_under_spmd(
    monkeypatch: pytest.MonkeyPatch, spmd: bool, expected: Runtime | None
) -> None:
    fake = SimpleNamespace(_XLAC=SimpleNamespace(_xla_runtime_is_initialized=lambda: True))
    xr = SimpleNamespace(is_spmd=lambda: spmd, global_ordinal=lambda: 1, world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", xr)
    assert runtime() == expected


@pytest.mark.parametrize(("size", "how"), [(2, "shrank"), (8, "grew")])
def test_a_world_of_another_size_than_was_fixed_is_refused(size: int, how: str) -> None:
    with pytest.raises(WorldChanged, match=f"the world {how}: the plan is for 4 ranks, and there are {size}"):
        World(size=size).require_size(4, "the plan")


def test_a_world_of_the_fixed_size_or_of_no_fixed_size_passes() -> None:
    World(size=4).require_size(4, "the plan")
    World(size=4).require_size(None, "the plan")


def test_a_round_has_another_name_after_a_restart_and_after_nodes_came_or_left() -> None:
    names = {
        World(size=size, launcher="torchrun", restart=restart).round for size in (2, 4) for restart in (0, 1)
    }
    assert len(names) == 4


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(WorldMismatch("what", "where")))
    assert (type(error), error.code, error.where) == (WorldMismatch, "DC401", "where")


def test_agents_that_count_restarts_differently_agree_on_a_round_whose_store_is_new() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "job"}
    new = {**torchrun, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for environment, names in ((torchrun, {"0-2", "1-2"}), (new, {"new-2"})):
        counts = ({**environment, "TORCHELASTIC_RESTART_COUNT": count} for count in ("0", "1"))
        assert {detect(env, lambda: None).round for env in counts} == names
