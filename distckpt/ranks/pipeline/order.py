"""Order: what this rank computes in one step, and where in it we are.

Note [Order]
    A schedule is a fixed list per rank. Those with a table of actions have it in an attribute; GPipe and 1F1B are
    written as loops, so their lists are made here. The stages' own calls move the cursor. A call that the list did
    not predict (somebody registered a computation of his own, or drives the stages himself) breaks the order until
    the next step: nothing is predicted then, and every replay waits for its gradient.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from distckpt._torch_dist import (
    BACKWARD,
    FORWARD,
    INPUT_BACKWARD,
    WEIGHT_BACKWARD,
    micro_batches,
    schedule_kind,
    schedule_stages,
    schedule_table,
)

Action = tuple[str, int, int]  # what, stage, micro-batch


class Order:
    """The computations of one rank in one step, with a cursor."""

    def __init__(self, actions: Iterable[Action]) -> None:
        self.actions = list(actions)
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self._at = 0
        self.broken = not self.actions

    def arrive(self, action: Action) -> None:
        """``action`` runs now."""
        if not self.broken and self.next() == action:
            self._at += 1
        else:
            self.broken = True

    def next(self) -> Action | None:
        """What this rank computes next; None when that is not known or the step is over."""
        return None if self.broken or self._at >= len(self.actions) else self.actions[self._at]

    def consumes_now(self, stage: int, micro_batch: int) -> bool:
        """Whether the whole backward of ``micro_batch`` is what comes next."""
        return self.next() == (BACKWARD, stage, micro_batch)

    def next_gradient(self) -> tuple[int, int] | None:
        """(stage, micro-batch) whose gradient this rank uses next; None when it computes something else next."""
        action = self.next()
        return action[1:] if action is not None and action[0] in (BACKWARD, INPUT_BACKWARD) else None

    def next_weight_half(self, done: Container[tuple[int, int]]) -> tuple[int, int, bool] | None:
        """(stage, micro-batch) of the next backward that adds to gradients of weights, ``done`` apart, and whether it
        is the last of its stage; None when it is a whole one, or when it is not known."""
        if self.broken:
            return None
        adds = [
            a for a in self.actions[self._at :] if a[0] in (BACKWARD, WEIGHT_BACKWARD) and a[1:] not in done
        ]
        if not adds or adds[0][0] == BACKWARD:
            return None
        stage, micro_batch = adds[0][1:]
        return stage, micro_batch, all(a[1] != stage for a in adds[1:])

    def uses_values(self, stage: int, micro_batch: int) -> bool:
        """Whether the backward that comes next needs region values before another computation.

        On the first stage torch's input half does nothing, and the weight half is the whole backward.
        """
        if stage > 0 or self.next() == (BACKWARD, stage, micro_batch):
            return True
        return self.actions[self._at + 1 : self._at + 2] == [(WEIGHT_BACKWARD, stage, micro_batch)]


def order_of(schedule: Any) -> Order:
    """The order of a schedule that :func:`~distckpt._torch_dist.schedule_kind` knows."""
    kind = schedule_kind(schedule)
    if kind == "table":
        return Order(schedule_table(schedule))
    stage = schedule_stages(schedule)[0]
    count = micro_batches(schedule)
    make = gpipe if kind == "gpipe" else one_forward_one_backward
    return Order(
        (what, stage.stage_index, i) for what, i in make(stage.num_stages - stage.stage_index, count)
    )


def gpipe(_to_the_end: int, count: int) -> list[tuple[str, int]]:
    """Every forward, then every backward from the first micro-batch on (Huang et al. 2019)."""
    return [(what, i) for what in (FORWARD, BACKWARD) for i in range(count)]


def one_forward_one_backward(to_the_end: int, count: int) -> list[tuple[str, int]]:
    """1F1B (PipeDream-flush, Narayanan et al. 2021): ``to_the_end`` stages from here on, this one included."""
    warm = min(count, to_the_end)
    order = [(FORWARD, i) for i in range(warm)]
    for i in range(count):
        order.append((BACKWARD, i))
        if warm + i < count:
            order.append((FORWARD, warm + i))
    return order
