"""Pipeline: sessions and early replays on a schedule of torch's, and how to take them off.

Note [When to prefetch]
    A stage posts the receive of a gradient, waits, and runs the backward. Between posting and waiting regions of that
    micro-batch are replayed, the newest first, as the backward will come to them; how many, the budget says. That
    costs no time, since the backward would have made the same replays after the wait; and no replay is made for any
    later backward, which could delay the next one. Whatever order other computations have, the random generators are
    put back by each replay, so a forward that comes between draws what it would have drawn. A region inside another one
    needs values of that one: it is replayed early if they are there, and never brings that replay about.

Note [Values that wait for weights]
    Between its input half and its weight half a micro-batch keeps the values that the second needs, so its regions run
    no third time. Torch's engine keeps none: its weight half replays every region once for each group of weights, and
    what a replay makes and its group does not use stays until the half is over. As many values may wait here. Before
    an input half that would add more, the weight half that comes next in the schedule is run at once. It needs no
    replay, and the gradients and the graph that waited for it go with the values. Weights get their gradients in the
    order of the schedule, so sums are equal to the bit. The values of one micro-batch always wait for its own half,
    which can be more than torch has (docs/ranks-pipeline.md, Limits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from distckpt._torch_dist import custom_computations, is_stage, schedule_kind, schedule_stages, step_with
from distckpt.engine.hooks import fill
from distckpt.engine.region import Region, owner
from distckpt.errors import AlreadyAttached, BadOption, StageNotInPlan, UnknownSchedule
from distckpt.modules import Applied, apply
from distckpt.modules.apply import Choice, parts_of
from distckpt.ranks.pipeline.schedule import Ahead, Order, StageReport, memory_budget, order_of
from distckpt.ranks.pipeline.stage import MicroBatch, Stage
from distckpt.ranks.plan import comparable


class Prefetch:
    """What happens in the waits of a schedule's step."""

    def __init__(self, stages: dict[int, Stage], order: Order) -> None:
        self.stages = stages
        self.order = order

    def wait(self, original: Callable[[Any], None], works: Any) -> None:
        """``original(works)``, after the replays that fit in before it."""
        if works:
            self.replay_next()
        original(works)

    def replay_next(self) -> None:
        """Replay for the backward that comes next, if its gradient is being received."""
        coming = self.order.next_gradient()
        if coming is None:
            return
        stage = self.stages[coming[0]]
        session = stage.sessions.get(coming[1])
        if session is not None and coming[1] in stage.posted:
            stage.posted.discard(coming[1])  # once, however many works the wait is split into
            if self.order.uses_values(*coming):
                prefetch(stage, session)
            else:
                stage.report.lazy[
                    "the first stage uses the values in its weight half, which comes later"
                ] += 1


def prefetch(stage: Stage, session: MicroBatch) -> None:
    """Replay the regions of ``session`` that may be, within the limit of the stage.

    Raises:
        CheckpointError: a replay does not match its forward.
    """
    units = stage.units()
    late = stage.report.lazy
    room = stage.room(session)
    regions = session.newest_first()
    if stage.limit is Ahead.NEWEST:
        for _ in regions[1:]:
            late["without ahead= only the newest region is early, which costs no memory"] += 1
        del regions[1:]
    stage.early = True
    try:
        for region in regions:
            reason = unsafe(region, units) or _no_room(stage, session, region, room)
            if reason is not None:
                late[reason] += 1
                continue
            fill(region)
            if room is not None and session.ahead > room:  # larger than in any micro-batch before
                late[f"more than {stage.limit} bytes ahead, seen after the replay"] += 1
                region.clear()
                session.ahead = session.held()
    finally:
        stage.early = False
    stage.report.ahead_bytes = max(stage.report.ahead_bytes, session.held())


def _no_room(stage: Stage, session: MicroBatch, region: Region, room: int | None) -> str | None:
    """Why the values of ``region`` would be too much, or too early, to hold before their gradient; None if not."""
    if stage.limit is Ahead.NEWEST and not session.ends_with_region:
        return "what the stage computes after its last region is in memory until the gradient comes"
    if not session.replayable(region):
        return "the region around it is not replayed early"
    if room is None:
        return None
    size = stage.sizes.get(session.place(region))
    if size is None:
        return "its size is not known before its first replay"
    return f"more than {stage.limit} bytes ahead" if session.ahead + size > room else None


def unsafe(region: Region, units: dict[torch.nn.Module, tuple[str, bool]]) -> str | None:
    """Why a region must not be replayed outside of a backward, or None."""
    if region.tie is not None:
        return f"a compiler for {region.tie.backend.device_type} would merge it with the forward without its gradient"
    if not units:
        return None
    module, through_hooks = owner(region)
    if module is None:
        return "a function that may call sharded units, which gather outside of a backward"
    parts = set(module.modules())
    closest = None  # the innermost unit around a module has its parameters; units are listed outermost first
    for unit, (name, gathered) in units.items():
        label = f"the sharded unit {name!r}" if name else "the whole stage, a sharded unit,"
        if unit in parts and (unit is not module or through_hooks):
            return f"it calls {label} which would gather outside of a backward"
        if module in set(unit.modules()):
            closest = None if gathered else f"{label} would gather outside of a backward"
    return closest


class WeightHalves:
    """The weight halves of the stages of one rank."""

    def __init__(self, schedule: Any, stages: dict[int, Stage], order: Order) -> None:
        self.schedule = schedule
        self.stages = stages
        self.order = order

    def make_room(self, coming: Stage) -> None:
        """Run weight halves, until the values of one more micro-batch of ``coming`` may wait."""
        while self._too_much(coming) and (due := self._due()) is not None:
            stage, index, last = due
            stage.weight_half_now(index, last)

    def _too_much(self, coming: Stage) -> bool:
        waiting = [s.weight_bytes for stage in self.stages.values() for s in stage.sessions.values()]
        known = [s.left_by_torch for s in self.stages.values() if s.left_by_torch is not None]
        return any(waiting) and sum(waiting) + coming.for_weights > min(known)

    def _due(self) -> tuple[Stage, int, bool] | None:
        """The next weight half, if it can be run now."""
        done = {(i, mb) for i, stage in self.stages.items() for mb in stage.weights_done}
        found = self.order.next_weight_half(done)
        if found is None or custom_computations(self.schedule):
            return None
        stage, index, last = self.stages[found[0]], *found[1:]
        return (stage, index, last) if stage.weight_half_ready(index) else None


class Attached:
    """What :func:`attach` put on this rank's stages and their schedule. Usable as a context manager.

    ``facts`` is what ranks compare: the plan for all stages, and for each stage of this rank its options and the
    regions that the plan has put on it. They have one spelling: 2**31 bytes are ``"2 GiB"``.
    """

    def __init__(
        self,
        schedule: Any,
        stages: dict[int, Stage],
        applied: dict[int, Applied],
        hooked: bool,
        facts: dict[str, Any],
    ) -> None:
        self._schedule = schedule
        self._stages = stages
        self._applied = applied
        self._hooked = hooked
        self.facts = facts

    @property
    def regions(self) -> dict[int, tuple[str, ...]]:
        """Per stage of this rank on which ``plan`` has put regions, the names of the modules."""
        return {index: applied.names for index, applied in self._applied.items()}

    def report(self) -> dict[int, StageReport]:
        """Per stage of this rank, what happened in the step that runs or ran last."""
        return {index: stage.report for index, stage in self._stages.items()}

    def remove(self) -> None:
        """Make stages, schedule and modules what they were before. Not inside a step. Idempotent."""
        for stage in self._stages.values():
            stage.detach()
        if self._hooked:
            self._schedule.__dict__.pop("_step_microbatches", None)
            self._hooked = False
        for applied in self._applied.values():
            applied.remove()
        self._stages, self._applied = {}, {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attached(stages {', '.join(map(str, self._stages)) if self._stages else 'removed'})"


def attach(
    coordinator: Any,
    schedule_or_stages: Any,
    *,
    early_replay: bool = True,
    ahead: int | str | None = None,
    plan: Mapping[int, Choice] | None = None,
) -> Attached:
    """One replay per region and micro-batch, for a pipeline of ``torch.distributed.pipelining``.

    Every micro-batch of a stage is a session: its regions are replayed once, for both halves of a split backward,
    and their values are dropped when the last half has used them. With ``early_replay`` replays for the next
    backward are made while its gradient is on its way: that of the newest region, which costs no memory, or more with
    ``ahead``. Where the backward of a micro-batch comes right after its forward (the last stage of 1F1B), the regions
    that ``ahead`` has room for are not replayed at all. In a split backward the values that a weight half needs wait
    for it; without ``ahead`` no more of them than torch's engine leaves behind in one: a weight half is run before its
    turn where there would be more.

    Args:
        coordinator: of this process.
        schedule_or_stages: a schedule, or this rank's stages for a schedule of your own. Stages alone do
            not tell the order of micro-batches, so no replay is early then (``report()`` says so).
        early_replay: replay before the gradient arrives.
        ahead: most bytes of region values that may exist before their gradient: a number, ``"2 GiB"``, or
            ``"1 micro-batch"`` (all regions of one). Left out: those of the newest region, if it makes the stage's
            output; any engine has them in memory next. With bytes, a region is replayed once before its size is known.
        plan: for every stage of the pipeline, the modules that become regions, as :func:`distckpt.apply` takes them;
            an empty list for none. Without it the stages keep the regions they have.

    Returns:
        A handle with ``report()`` and ``remove()``.

    Raises:
        UnknownSchedule: neither a schedule with a step that we know, nor stages.
        AlreadyAttached: a stage is attached already.
        StageNotInPlan: ``plan`` and the pipeline have different stages, or it is no plan by stage.
        BadAhead: ``ahead`` is no amount.
        BadOption: ``early_replay`` is neither True nor False.
        DistckptError: see :func:`distckpt.apply`. After any error everything is as it was.
    """
    if not isinstance(early_replay, bool):
        raise BadOption(f"early_replay is True or False, not {early_replay!r}", fix="early_replay=False")
    limit = memory_budget(early_replay, ahead)
    stages, schedule = _stages(schedule_or_stages)
    for stage in stages:
        if hasattr(stage, "_distckpt_stage"):
            raise AlreadyAttached(
                f"stage {stage.stage_index} is attached already",
                why="its micro-batches would have two sessions each",
                fix="call remove() on the first handle",
            )
    if plan is not None:
        _check_plan(plan, stages[0].num_stages)
        plan = {stage: _read(plan[stage]) for stage in plan}
    order = order_of(schedule) if schedule is not None else Order(())
    hooked = {stage.stage_index: Stage(stage, order, limit) for stage in stages}
    early = Prefetch(hooked, order)
    step = step_with(schedule, early.wait) if schedule is not None and early_replay else None
    if ahead is None and schedule is not None:
        halves = WeightHalves(schedule, hooked, order)
        for found in hooked.values():
            found.make_room = halves.make_room
    if early_replay:
        for found in hooked.values():
            found.why_unseen = partial(_why_unseen, schedule, step is not None)
    options = {"early_replay": early_replay, "ahead": limit.value if isinstance(limit, Ahead) else limit}
    facts: dict[str, Any] = {
        "plan": None if plan is None else {stage: _said(choice) for stage, choice in plan.items()},
        **{f"options of stage {index}": options for index in hooked},
    }
    applied: dict[int, Applied] = {}
    try:
        for stage in stages if plan is not None else ():
            choice = plan[stage.stage_index] if plan is not None else None
            if choice != []:
                applied[stage.stage_index] = apply(stage.submod, choice)
    except BaseException:
        for one in applied.values():
            one.remove()
        raise
    for stage in hooked.values():
        stage.attach()
    if schedule is not None and step is not None:
        schedule._step_microbatches = step
    facts |= {f"regions of stage {index}": one.names for index, one in applied.items()}
    return Attached(schedule, hooked, applied, step is not None, facts)


def _stages(given: Any) -> tuple[list[Any], Any]:
    """This rank's stages, and the schedule if there is one."""
    if schedule_kind(given) is not None:
        return schedule_stages(given), given
    stages = [given] if is_stage(given) else list(given) if isinstance(given, (list, tuple)) else []
    if stages and all(map(is_stage, stages)):
        return stages, None
    raise UnknownSchedule(
        f"{type(given).__name__} is no schedule of torch.distributed.pipelining that is known here",
        why="its order of micro-batches is not known, or it trains nothing",
        fix="give GPipe, 1F1B, a schedule with a table of actions, or this rank's pipeline stages",
    )


def _read(choice: Any) -> Any:
    """A choice that can be read twice, and ``[]`` for none: an iterator is empty the second time."""
    return [*choice] if isinstance(choice, (Iterator, tuple, set, frozenset)) else choice


def _said(choice: Choice) -> Any:
    """A choice in a form that does not depend on who wrote it: a glob is a list of one, and modules, which only the
    ranks of their stage have, are their classes."""
    return sorted(
        type(part).__name__ if isinstance(part, torch.nn.Module) else str(comparable(part))
        for part in parts_of(choice)
    )


def _check_plan(plan: Mapping[int, Any], count: int) -> None:
    if not isinstance(plan, Mapping):
        raise StageNotInPlan(
            f"a plan says for every stage which modules are regions, and this is a {type(plan).__name__}",
            fix='plan={0: "layers.*", 1: "layers.*", 2: []}; an empty list is a stage without regions',
        )
    missing = sorted(set(range(count)) - set(plan))
    extra = sorted(set(plan) - set(range(count)), key=str)
    if missing or extra:
        what = (
            f"stage {missing[0]} is missing from the plan"
            if missing
            else f"the plan has a stage {extra[0]!r}"
        )
        raise StageNotInPlan(
            what,
            where=f"plan for stages {', '.join(map(repr, plan))}",
            why=f"the pipeline has the stages 0 to {count - 1}, and every rank needs the same plan",
            fix="name every stage, by its number; an empty list is a stage without regions",
        )
    silent = sorted(stage for stage, choice in plan.items() if choice is None)
    if silent:
        raise StageNotInPlan(
            f"the plan says None for stage {silent[0]}", fix="write an empty list for a stage without regions"
        )


def _why_unseen(schedule: Any, hooked: bool) -> str:
    """Why a gradient was received and nobody saw the wait for it."""
    if schedule is None:
        return "stages alone do not tell which micro-batch comes next"
    if not hooked:
        return "the schedule's step has no wait that can be used"
    custom = custom_computations(schedule)
    if custom:
        return f"the computation {custom[0]} of the schedule is a function of your own"
    return "its gradient was received without a wait that is seen"
