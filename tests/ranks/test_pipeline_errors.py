"""What attach refuses, and that it leaves everything as it was then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import pipelining as pp
from torch.distributed.pipelining.schedules import _ScheduleForwardOnly

from distckpt.errors import AlreadyAttached, BadAhead, NoMatch, StageNotInPlan, UnknownSchedule
from distckpt.ranks import Coordinator
from tests.ranks.jobs.pipeline import Part, loss_of

pytestmark = pytest.mark.usefixtures("alone")
PLAN = {0: "blocks.*", 1: "blocks.*"}


class Own(pp.ScheduleGPipe):
    """A schedule with a step of its own."""

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def made(kind: Any = pp.ScheduleInterleaved1F1B) -> tuple[Any, list[Any]]:
    count = 2 if kind is pp.ScheduleInterleaved1F1B else 1
    stages = [pp.PipelineStage(Part(), i, count, torch.device("cpu")) for i in range(count)]
    if kind is _ScheduleForwardOnly:
        return kind(stages[0], 2), stages
    return kind(stages if count == 2 else stages[0], 2, loss_fn=loss_of), stages


def state(schedule: Any, stages: list[Any]) -> list[set[str]]:
    return [
        set(vars(thing)) for thing in (schedule, *stages, *(m for s in stages for m in s.submod.modules()))
    ]


def refused(error: type[BaseException], schedule: Any, stages: list[Any], *args: Any, **options: Any) -> Any:
    """The error of ``attach``, after which nothing has changed."""
    before = state(schedule, stages)
    with pytest.raises(error) as caught:
        Coordinator().attach(*(args or (schedule,)), **options)
    assert state(schedule, stages) == before
    return caught.value


@pytest.mark.parametrize("kind", [Own, _ScheduleForwardOnly])
def test_a_schedule_with_a_step_we_do_not_know_is_refused(kind: Any) -> None:
    error = refused(UnknownSchedule, *made(kind))
    assert error.code == "DC430"
    assert kind.__name__ in str(error)


@pytest.mark.parametrize("given", [None, [], [1], "GPipe", torch.nn.Linear(1, 1)], ids=str)
def test_what_is_neither_a_schedule_nor_stages_is_refused(given: Any) -> None:
    schedule, stages = made()
    assert refused(UnknownSchedule, schedule, stages, given).code == "DC430"


@pytest.mark.parametrize(
    "again", [lambda s, st: s, lambda s, st: st, lambda s, st: st[1]], ids=["schedule", "stages", "one"]
)
def test_attaching_twice_is_refused(again: Callable[[Any, Any], Any]) -> None:
    schedule, stages = made()
    with Coordinator().attach(schedule):
        error = refused(AlreadyAttached, schedule, stages, again(schedule, stages), plan=PLAN)
        assert error.code == "DC431"
    Coordinator().attach(schedule).remove()


@pytest.mark.parametrize(
    ("plan", "said"),
    [({0: "blocks.*"}, "stage 1 is missing"), ({}, "stage 0 is missing"), ({**PLAN, 2: []}, "has a stage 2")],
)
def test_a_plan_for_other_stages_is_refused(plan: Any, said: str) -> None:
    error = refused(StageNotInPlan, *made(), plan=plan)
    assert error.code == "DC432"
    assert said in str(error)


def test_a_glob_that_matches_nothing_in_a_later_stage_takes_the_earlier_ones_off() -> None:
    refused(NoMatch, *made(), plan={0: "blocks.*", 1: "layers.*"})


def test_a_stage_may_have_no_regions() -> None:
    schedule, stages = made()
    with Coordinator().attach(schedule, plan={0: ["blocks.0", "blocks.1"], 1: []}):
        assert [["forward" in vars(b) for b in s.submod.blocks] for s in stages] == [
            [True, True],
            [False, False],
        ]


@pytest.mark.parametrize("ahead", [0, -1, True, 1.5, "1", "two", "3 micro-batches", "1 XiB", "0 GiB", "GiB"])
def test_an_amount_that_is_none_is_refused(ahead: Any) -> None:
    assert refused(BadAhead, *made(), ahead=ahead).code == "DC433"


def test_an_amount_without_early_replay_is_refused() -> None:
    refused(BadAhead, *made(), early_replay=False, ahead="1 GiB")
