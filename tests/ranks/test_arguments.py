"""What people write in coord.* by another library's habit: it works, or it is one coded sentence with the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distckpt_backends.errors import DistckptError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import distckpt as dc
from distckpt.ranks import Coordinator
from distckpt.ranks.fsdp import Sharded
from tests.ranks.sharded import Block, Model

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.usefixtures("alone"),
]
LAYERS = ("stack.layers.0", "stack.layers.1")


def schedule() -> ScheduleGPipe:
    stage = PipelineStage(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0, 1, torch.device("cpu"))
    return ScheduleGPipe(stage, 2, loss_fn=lambda y, t: (y - t).square().sum())


FORMS: dict[str, Callable[[Model], Any]] = {
    "a class": lambda model: Block,
    "a list of a class": lambda model: [Block],
    "a set of a class": lambda model: {Block},
    "a function of a module": lambda model: lambda module: isinstance(module, Block),
    "a list of modules": lambda model: list(model.stack.layers),
    "a ModuleList": lambda model: model.stack.layers,
    "an iterator": lambda model: iter(model.stack.layers),
}


@pytest.mark.parametrize("form", FORMS)
def test_units_are_chosen_in_every_form_of_apply_and_each_module_is_a_unit(
    coord: Coordinator, form: str
) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, FORMS[form](model))
    assert handle.units == (*LAYERS, "")
    assert handle.regions == LAYERS


@pytest.mark.parametrize("form", FORMS)
def test_regions_are_chosen_in_every_form_of_apply(coord: Coordinator, form: str) -> None:
    model = Model(2)
    assert coord.fully_shard(model, [], regions=FORMS[form](model)).regions == LAYERS


def test_one_module_is_one_unit_and_one_region(coord: Coordinator) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, model.stack, regions=model.stack.layers[1])
    assert (handle.units, handle.regions) == (("stack", ""), ("stack.layers.1",))


def test_a_list_inside_units_makes_one_unit_as_a_tuple_does(coord: Coordinator) -> None:
    handle = coord.fully_shard(Model(2), ["stack.layers.*", ["norm", "head"]], regions=None)
    assert handle.units == (*LAYERS, "norm+head", "")


@pytest.mark.parametrize("key", ["stack.layers.*", Block, "module"])
def test_an_override_names_its_units_by_glob_class_or_module(coord: Coordinator, key: Any) -> None:
    model = Model(1)
    key = model.stack.layers[0] if key == "module" else key
    options = {"reshard_after_forward": False}
    handle = coord.fully_shard(model, "stack.layers.*", overrides={key: options})
    assert handle.options["stack.layers.0"]["reshard_after_forward"] is False
    assert "reshard_after_forward" not in handle.options[""]


@pytest.mark.parametrize("kind", [set, list, iter])
def test_ignored_parameters_may_be_any_collection_and_stay_whole(coord: Coordinator, kind: Any) -> None:
    model = Model(1)
    coord.fully_shard(model, "stack.layers.*", ignored_params=kind([*model.head.parameters()]))
    assert type(model.head.weight.data) is torch.Tensor
    assert type(model.norm.weight.data) is not torch.Tensor


def shard(
    units: Any = "stack.layers.*", model: Any = None, **options: Any
) -> Callable[[Coordinator], Sharded]:
    return lambda coord: coord.fully_shard(Model(1) if model is None else model, units, **options)


REFUSED: dict[str, tuple[str, Callable[[Coordinator], Any]]] = {
    "units of a wrap policy": ("DC306", shard(ModuleWrapPolicy({Block}))),
    "units of None": ("DC306", shard(None)),
    "units of a table": ("DC306", shard({"stack.layers.*": {}})),
    "units of a list with None": ("DC306", shard([None])),
    "units of a class that is not there": ("DC420", shard(nn.GRU)),
    "regions of True": ("DC306", shard(regions=True)),
    "regions of a table": ("DC306", shard(regions={"stack.layers.*": {}})),
    "regions of nothing": ("DC301", shard(regions=[])),
    "a list of layers as the model": ("DC305", shard(model=[nn.Linear(1, 1)])),
    "units before the model": ("DC305", shard(nn.Linear(1, 1), model="*")),
    "overrides in a list": ("DC109", shard(overrides=["stack.layers.0"])),
    "an override that is no table": ("DC109", shard(overrides={"stack.layers.0": True})),
    "an override by None": ("DC306", shard(overrides={None: {}})),
    "a dtype as the policy": ("DC109", shard(mp_policy=torch.bfloat16)),
    "offload_policy=True": ("DC109", shard(offload_policy=True)),
    "ignored parameters by name": ("DC109", shard(ignored_params="head.weight")),
    "context_fn that is no function": ("DC109", shard(context_fn=3)),
    "a plan without stages": ("DC432", lambda coord: coord.attach(schedule(), plan="*")),
    "a plan in a list": ("DC432", lambda coord: coord.attach(schedule(), plan=["*"])),
    "a plan of a class": ("DC432", lambda coord: coord.attach(schedule(), plan=nn.Linear)),
    "a plan with None": ("DC432", lambda coord: coord.attach(schedule(), plan={0: None})),
    "a plan with a number": ("DC306", lambda coord: coord.attach(schedule(), plan={0: 3})),
    "a region plan for attach": (
        "DC432",
        lambda coord: coord.attach(schedule(), plan=dc.ranks.RegionPlan({"0": {}})),
    ),
    "early_replay in words": ("DC109", lambda coord: coord.attach(schedule(), early_replay="no")),
    "a model to attach": ("DC430", lambda coord: coord.attach(nn.Linear(1, 1))),
    "a pipeline stage to check": ("DC109", lambda coord: coord.check(schedule()._stage)),
    "a pipeline stage as the stage": (
        "DC109",
        lambda coord: coord.check(nn.Linear(1, 1), stage=schedule()._stage),
    ),
    "a stage named by an object": ("DC109", lambda coord: coord.check({object(): nn.Linear(1, 1)})),
    "every in words": ("DC109", lambda coord: coord.watch(every="2")),
    "every of a half": ("DC109", lambda coord: coord.watch(every=1.5)),
    "streams of a group": ("DC452", lambda coord: coord.streams(dist.group.WORLD, 1)),
    "streams of a number": ("DC452", lambda coord: coord.streams(3, 1)),
    "streams in a list": ("DC452", lambda coord: coord.streams(None, 1, streams=["router"])),
    "a stream over a number": ("DC452", lambda coord: coord.streams(None, 1, streams={"router": 3})),
    "a stream over numbers": ("DC452", lambda coord: coord.streams(None, 1, streams={"router": [3]})),
    "a stream without a name": ("DC452", lambda coord: coord.streams(None, 1, streams={3: ["dp"]})),
    "aliases in a list": ("DC452", lambda coord: coord.streams(None, 1, aliases=["my_dim"])),
    "an alias of a list": ("DC452", lambda coord: coord.streams(None, 1, aliases={"my_dim": ["dp"]})),
    "guarding a name": ("DC305", lambda coord: dc.guard_units("layers.*")),
    "an endless timeout": ("DC109", lambda coord: Coordinator(timeout=float("inf"))),
    "an alarm in words": ("DC109", lambda coord: Coordinator(alarm="no")),
    "a store by name": ("DC109", lambda coord: Coordinator(store="localhost:29500")),
    "a world of a number": ("DC109", lambda coord: Coordinator(world=8)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_near_miss_is_one_coded_sentence_with_a_fix(coord: Coordinator, case: str) -> None:
    code, call = REFUSED[case]
    with pytest.raises(DistckptError) as caught:
        call(coord)
    assert caught.value.code == code
    assert caught.value.fix


PLANS: dict[str, Callable[[Any], Any]] = {
    "a class": lambda stage: nn.Linear,
    "a set": lambda stage: {nn.Linear},
    "a function of a module": lambda stage: lambda module: isinstance(module, nn.Linear),
    "modules": lambda stage: list(stage.submod),
    "an iterator": lambda stage: iter(["0", "1"]),
}


@pytest.mark.parametrize("form", PLANS)
def test_a_plan_chooses_modules_in_every_form_of_apply(coord: Coordinator, form: str) -> None:
    pipeline = schedule()
    with coord.attach(pipeline, plan={0: PLANS[form](pipeline._stage)}) as handle:
        assert handle.regions == {0: ("0", "1")}


@pytest.mark.parametrize("nothing", [[], (), set(), iter([])])
def test_an_empty_choice_in_a_plan_is_a_stage_without_regions(coord: Coordinator, nothing: Any) -> None:
    with coord.attach(schedule(), plan={0: nothing}) as handle:
        assert handle.regions == {}


def test_mesh_names_are_asked_of_a_mesh(coord: Coordinator) -> None:
    with pytest.raises(DistckptError, match="whose dims have names"):
        coord.streams(init_device_mesh("cpu", (1,)), 1)
