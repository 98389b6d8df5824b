"""Two ranks attach to a pipeline: with equal plans, with other ones, and with an error on one of them."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from distckpt_backends.errors import DistckptError
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from distckpt.ranks import Coordinator
from tests.ranks.spawn import leave, report

dist.init_process_group("gloo")
RANK = dist.get_rank()
ALONE, _ = dist.new_subgroups(1)
PLAN = {0: "*", 1: "*"}


class Broken(dict[int, str]):
    """A plan that cannot be read."""

    def __getitem__(self, key: int) -> str:
        raise KeyError("not today")


def linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def made(one_stage: bool = False) -> ScheduleGPipe:
    """A pipeline over the ranks, or the same one-stage pipeline on each of them."""
    part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    index, count, group = (0, 1, ALONE) if one_stage else (RANK, 2, None)
    stage = PipelineStage(part, index, count, torch.device("cpu"), group=group)
    return ScheduleGPipe(stage, 2, loss_fn=lambda y, t: (y - t).square().sum())


def attempt(
    here: int | None = None, alarm: bool = False, one_stage: bool = False, **options: Any
) -> dict[str, Any]:
    """What attach does where ``options`` are this rank's only if it is ``here``, and what is left of it."""
    schedule = made(one_stage)
    stage: Any = schedule._stage
    before = [set(vars(thing)) for thing in (schedule, stage, *stage.submod.modules())]
    given = options if here in (None, RANK) else {}
    if given.get("plan") == "modules":
        given = {"plan": {0: [*stage.submod]}}
    coord = Coordinator(alarm=alarm)
    found: dict[str, Any]
    try:
        handle = coord.attach(schedule, **{"plan": PLAN, **given})
        found = {"attached": repr(handle), "regions": handle.regions}
        handle.remove()
    except DistckptError as error:
        found = {"code": error.code, "text": str(error), "cause": repr(error.__cause__)}
    after = [set(vars(thing)) for thing in (schedule, stage, *stage.submod.modules())]
    return {**found, "as before": before == after}


def alarms() -> int:
    return sum(thread.name == "distckpt-alarm" for thread in threading.enumerate())


found: dict[str, Any] = {
    "equal": attempt(),
    "another plan": attempt(1, plan={0: "*", 1: "1"}),
    "no plan": attempt(1, plan=None),
    "ahead in another stage": attempt(1, ahead="2 GiB"),
    "an error on one rank": attempt(0, ahead="much"),
    "an error of no code on one rank": attempt(1, plan=Broken(PLAN)),
    "equal again": attempt(),
    "one stage, spelled otherwise": attempt(
        one_stage=True,
        **[{"plan": {0: ["1", "0"]}, "ahead": "2 GiB"}, {"plan": {0: ("0", "1")}, "ahead": 2**31}][RANK],
    ),
    "one stage, by class": attempt(one_stage=True, plan={0: nn.Linear}),
    "one stage, by a function": attempt(one_stage=True, plan={0: linear}),
    "one stage, by modules": attempt(one_stage=True, plan="modules"),
    "one stage, another amount": attempt(
        one_stage=True, plan={0: "*"}, ahead=["2 GiB", "1 micro-batch"][RANK]
    ),
    "one stage, a function that asks for the rank": attempt(
        one_stage=True, plan={0: lambda name, module: name == str(RANK)}
    ),
    "alarms before": alarms(),
}
attempt(alarm=True)
attempt(alarm=True)
found["alarms"] = alarms()
report(found)
leave()
