"""Schedule: what this rank computes in one step, what may be held ahead of it, and the report on what happened.

Note [Order]
    A schedule is a fixed list per rank. Those with a table of actions have it in an attribute; GPipe and 1F1B are
    written as loops, so their lists are made here. The stages' own calls move the cursor. A call that the list did
    not predict (somebody registered a computation of his own, or drives the stages himself) breaks the order until
    the next step: nothing is predicted then, and every replay waits for its gradient.

Note [What costs no peak]
    Any engine has the values of one region at a time in memory, of the newest first: what makes a stage's output is the
    first thing that its backward needs. So these values may exist while the gradient is on its way, and nothing else
    may: an older region would add its values to theirs, what the stage computes after its last region is still
    saved then, and a region that is kept on the last stage would add its values to whatever the loss needs.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import Counter
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
from distckpt.errors import BadAhead

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


_UNITS = {"B": 1} | {
    f"{letter}{kind}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for kind, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*")
ONE = "1 micro-batch"


class Ahead(enum.Enum):
    """A limit that is no number of bytes."""

    NEWEST = "the newest region"
    ALL = ONE


def memory_budget(early_replay: bool, ahead: int | str | None) -> int | Ahead:
    """What may be held ahead; 0 for nothing.

    Raises:
        BadAhead: not an amount, more than one micro-batch, or given although early replay is off.
    """
    if not early_replay:
        if ahead is not None:
            raise BadAhead(
                f"ahead={ahead!r} was given with early_replay=False",
                why="nothing is held ahead of its gradient when no replay is early",
                fix="leave one of the two out",
            )
        return 0
    if ahead is None:
        return Ahead.NEWEST
    if ahead == ONE:
        return Ahead.ALL
    if isinstance(ahead, int) and not isinstance(ahead, bool) and ahead > 0:
        return ahead
    size = _SIZE.fullmatch(ahead) if isinstance(ahead, str) else None
    amount = int(float(size[1]) * _UNITS[size[2]]) if size is not None and size[2] in _UNITS else 0
    if amount <= 0:
        raise BadAhead(
            f"ahead={ahead!r} is no amount that can be held ahead",
            why="a replay is only made early for the backward that comes next, which is of one micro-batch",
            fix=f'give bytes (2**30), a size ("1.5 GiB", "800 MB"), or {ONE!r}; leave it out for what '
            "costs no memory; early_replay=False holds nothing ahead",
        )
    return amount


Key = tuple[int, str]  # micro-batch, region


@dataclasses.dataclass
class StageReport:
    """Counts of one stage, of the step that runs or ran last. A region is named by its place in the stage.

    Attributes:
        stage: index of the stage.
        replays: of each (micro-batch, region), early ones included.
        early: those of ``replays`` that were made before the gradient arrived.
        kept: (micro-batch, region) that was a plain call, since its backward came next.
        ahead_bytes: most bytes that early replays held when a gradient was waited for.
        weight_bytes: most bytes that were kept between the input half and the weight half of a split backward.
        weights_early: weight halves that were run before their turn, so that no values pile up for them.
        lazy: reasons why a replay waited for its gradient, with how often.
    """

    stage: int
    replays: Counter[Key] = dataclasses.field(default_factory=Counter)
    early: Counter[Key] = dataclasses.field(default_factory=Counter)
    kept: Counter[Key] = dataclasses.field(default_factory=Counter)
    ahead_bytes: int = 0
    weight_bytes: int = 0
    weights_early: int = 0
    lazy: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"stage {self.stage}: {self.replays.total()} replays, {self.early.total()} of them early, "
            f"{self.kept.total()} regions kept; {self.ahead_bytes} bytes ahead, {self.weight_bytes} for weights"
        ]
        if self.weights_early:
            lines.append(
                f"  {self.weights_early} weight halves run before their turn, so that no values pile up"
            )
        lines += [f"  not early ({times}x): {reason}" for reason, times in self.lazy.items()]
        return "\n".join(lines)
