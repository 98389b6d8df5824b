"""The facade: what it costs to have it, and what it refuses."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

import pytest
from torch import nn

import distckpt as dc
from distckpt.errors import (
    BadOption,
    MixedRankDevices,
    NoStore,
    PlanNotMet,
    RanksMissing,
    StageMissing,
    WorldChanged,
)
from distckpt.ranks import RegionPlan, World
from tests.processes import run
from tests.ranks.spawn import run_ranks


def model() -> nn.Module:
    made = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    dc.apply(made, "*")
    return made


def test_importing_distckpt_imports_no_room_of_the_ranks_floor_until_the_coordinator_is_named() -> None:
    code = """
import sys, json, distckpt as dc
before = [m for m in sys.modules if m.startswith("distckpt.ranks") or m == "distckpt._torch_dist"]
dc.Coordinator
after = "distckpt.ranks.coordinator" in sys.modules
print(json.dumps([before, after, dc.Coordinator is vars(dc)["Coordinator"]]))
"""
    done = run([sys.executable, "-c", code], limit=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], True, True]


def test_a_name_that_distckpt_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Coordinater'"):
        dc.Coordinater  # type: ignore[attr-defined]  # noqa: B018


def test_alone_in_one_process_everything_works_without_a_store() -> None:
    coord = dc.Coordinator()
    assert (coord.rank, coord.world_size, coord.restart) == (0, 1, 0)
    assert list(coord.check(model()).stages["0"]) == ["0", "1"]
    with coord, coord.watch() as watch:
        pass
    assert watch.compared == 0
    assert coord._alarm is None


def test_alone_a_plan_is_still_held_against_the_model() -> None:
    coord = dc.Coordinator()
    with pytest.raises(StageMissing, match="nothing about stage 1"):
        coord.check(model(), RegionPlan.of(model()), stage=1)
    with pytest.raises(PlanNotMet, match="stage 0 has other regions than the plan"):
        coord.check(nn.Sequential(), RegionPlan.of(model()))
    with pytest.raises(WorldChanged):
        coord.check(model(), RegionPlan.of(model(), world_size=2))


def test_a_stage_without_its_predecessors_is_missing_them() -> None:
    with pytest.raises(StageMissing, match="no rank has stage 0"):
        dc.Coordinator().check(model(), stage=1)
    dc.Coordinator().check(model(), stage="decoder")  # names have no order


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "maybe"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": "60"},
        {"timeout": True},
        {"timeout": None},
        {"device_type": 0},
        {"world_size": "8"},
        {"world_size": 0},
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options: Any) -> None:
    with pytest.raises(BadOption, match="DC109"):
        dc.Coordinator(**options)
    with pytest.raises(BadOption):
        dc.Coordinator().watch(every=0)


@pytest.mark.parametrize("wrong", ["model", [nn.Linear(2, 2)], {0: "first"}, 3, nn.Linear])
def test_what_is_no_model_is_one_coded_sentence(wrong: Any) -> None:
    with pytest.raises(BadOption, match="check looks at a module or at a mapping of stages to modules"):
        dc.Coordinator().check(wrong)


@pytest.mark.parametrize("wrong", [object(), "pp", 3])
def test_what_is_no_mesh_is_one_coded_sentence(wrong: Any) -> None:
    with pytest.raises(BadOption, match="mesh is a DeviceMesh"):
        dc.Coordinator().check(model(), mesh=wrong)


def test_every_method_of_the_coordinator_has_a_signature_and_a_docstring_of_its_own() -> None:
    for name, method in vars(dc.Coordinator).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        kinds = {p.kind for p in inspect.signature(method).parameters.values()}
        assert name == "fully_shard" or inspect.Parameter.VAR_KEYWORD not in kinds, name
        assert method.__doc__, name
        assert not method.__doc__.startswith("See "), name


@pytest.mark.parametrize(
    ("method", "room"),
    [
        ("attach", "distckpt.ranks.pipeline.attach"),
        ("fully_shard", "distckpt.ranks.fsdp.fully_shard"),
        ("streams", "distckpt.ranks.rng_streams.seed_streams"),
        ("partition", "distckpt.ranks.partition.Partition"),
        ("load_state_dict", "distckpt.ranks.rng_states.load_state_dict"),
    ],
)
def test_the_facade_has_the_options_and_defaults_of_the_room_that_does_the_work(
    method: str, room: str
) -> None:
    module, name = room.rsplit(".", 1)
    theirs = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    ours = inspect.signature(getattr(dc.Coordinator, method)).parameters
    assert {n: p.default for n, p in ours.items() if n != "self"} == {
        n: p.default for n, p in theirs.items() if n not in ("coord", "coordinator")
    }


def test_stages_named_twice_are_refused() -> None:
    with pytest.raises(BadOption, match="as well"):
        dc.Coordinator().check({0: model()}, stage=0)


def test_several_ranks_without_a_place_to_meet_are_refused() -> None:
    with pytest.raises(NoStore, match="2 ranks have no store"):
        dc.Coordinator(world=World(0, 2, launcher="process group")).check()


class _Elsewhere(nn.Module):
    """A module whose tensors claim other devices: there is one device type on a test machine."""

    def __init__(self, *types: str) -> None:
        super().__init__()
        self.types = types

    def parameters(self, recurse: bool = True) -> Any:
        from types import SimpleNamespace

        return iter([SimpleNamespace(device=SimpleNamespace(type=kind)) for kind in self.types])


def test_a_rank_whose_model_is_on_two_device_types_is_refused_and_cpu_and_meta_do_not_count() -> None:
    with pytest.raises(MixedRankDevices, match="on cuda and xla"):
        dc.Coordinator().check(_Elsewhere("cpu", "xla", "meta", "cuda"))
    dc.Coordinator().check(_Elsewhere("cpu", "cuda", "meta"))
    dc.Coordinator(rule="all").check(_Elsewhere("mps", "cuda"))
    with pytest.warns(UserWarning, match="several device types"):
        dc.Coordinator(rule="warn").check(_Elsewhere("mps", "cuda"))


def test_a_model_on_another_device_type_than_the_coordinators_is_refused() -> None:
    with pytest.raises(MixedRankDevices, match="the coordinator is for cuda"):
        dc.Coordinator("cuda").check(_Elsewhere("mps"))
    with pytest.raises(MixedRankDevices, match="the coordinator is for cpu"):
        dc.Coordinator("cpu").check(_Elsewhere("mps"))


@pytest.fixture(scope="module", params=["dies", "late"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks("tests.ranks.jobs.late", 3, request.param, check=False)


def test_a_rank_that_dies_or_is_late_is_named_on_all_others_after_the_timeout(ranks: Any) -> None:
    reports = [rank["report"] for rank in ranks if rank["report"]]
    assert len(reports) >= 2, ranks
    for said in reports:
        assert said["class"] == RanksMissing.__name__
        assert "[DC404] rank 2 did not come to check 2 within 2 s" in said["text"]
        assert "2 of 3 ranks are waiting there" in said["text"]
