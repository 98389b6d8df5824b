"""Early: replays that are made while a gradient is on its way.

Note [When]
    A stage posts the receive of a gradient, waits, and runs the backward. Between posting and waiting regions of that
    micro-batch are replayed, the newest first, as the backward will come to them; how many, ``limit.py`` says. That
    costs no time, since the backward would have made the same replays after the wait; and no replay is made for any
    later backward, which could delay the next one. Whatever order other computations have, the random generators are
    put back by each replay, so a forward that comes between draws what it would have drawn. A region inside another one
    needs values of that one: it is replayed early if they are there, and never brings that replay about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distckpt.engine.hooks import fill
from distckpt.engine.region import Region, owner
from distckpt.ranks.pipeline.limit import Ahead
from distckpt.ranks.pipeline.order import Order
from distckpt.ranks.pipeline.session import MicroBatch
from distckpt.ranks.pipeline.stage import Stage


class EarlyReplay:
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
                replay_ahead(stage, session)
            else:
                stage.report.lazy[
                    "the first stage uses the values in its weight half, which comes later"
                ] += 1


def replay_ahead(stage: Stage, session: MicroBatch) -> None:
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
