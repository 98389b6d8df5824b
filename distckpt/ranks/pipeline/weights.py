"""Weights: which weight halves of split backwards are run before their turn, so that no values pile up for them.

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

from typing import Any

from distckpt._torch_dist import custom_computations
from distckpt.ranks.pipeline.order import Order
from distckpt.ranks.pipeline.stage import Stage


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
