"""XLA's random state, and the part of it that its public state does not show.

Note [Root]
    A device has a running seed, which every draw moves on by one step of a generator, and the root that the running
    seed started from. Flushing the graph makes the next root from the root, not from the running seed. Setting the
    state sets both, so a replay that puts the running seed back leaves another root, and from the next step on the
    device would draw other numbers than without regions. So the root is read before a replay's first restore, and
    when the backward ends it is set again and drawn from until the running seed is where it was: about 15
    microseconds of tracing per draw since the root, once per backward. Nobody uses these draws, so no program has them.
"""

from __future__ import annotations

from functools import partial

import torch

from . import _torch

_OUTSIDE = -1
_FACTOR, _STEP, _MASK = 214013, 2531011, (1 << 64) - 1
_FAR = 1 << 16  # draws in one step; further away is another seed


def distance(root: int, seed: int) -> int | None:
    """How many draws lead from `root` to `seed`; None when none do, or more than 65,536."""
    for count in range(_FAR):
        if root == seed:
            return count
        root = (_STEP + _FACTOR * root) & _MASK
    return None


class Loan:
    """The seed of one device while replays set others. One backward is one loan; outside of any, one replay is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._roots: dict[int, int | None] = {}  # by backward that is running
        self._lent = 0  # outside of any: how deep

    def lend(self) -> int:
        """The running seed. Its root is remembered."""
        task = _torch.backward_number()
        if task not in self._roots:
            self._roots[task] = _torch.xla_get_root_seed(self._name)
            if task != _OUTSIDE:
                _torch.at_end_of_backward(partial(self._settle, task))
        if task == _OUTSIDE:
            self._lent += 1
        return _torch.xla_get_seed(self._name)

    def take_back(self, seed: int) -> None:
        """Set the running seed; its root follows when the backward that is running ends, or now when none is."""
        _torch.xla_set_seed(seed, self._name)
        if _torch.backward_number() == _OUTSIDE:
            self._lent -= 1
            if self._lent <= 0:
                self._lent = 0
                self._settle(_OUTSIDE)

    def _settle(self, task: int) -> None:
        """Set root and running seed as if no replay had been."""
        root = self._roots.pop(task, None)
        if task != _OUTSIDE:  # a backward that failed never settled, and those inside this one have ended
            self._roots = {t: r for t, r in self._roots.items() if t < task}
        seed = _torch.xla_get_seed(self._name)
        if root is None or root == seed:
            return
        count = distance(root, seed)
        if count is None:  # somebody chose another seed meanwhile
            return
        _torch.xla_set_seed(root, self._name)
        _torch.xla_draw(torch.device(self._name), count)
        if _torch.xla_get_seed(self._name) != seed:  # each draw ran at once, and made a root (eager mode)
            _torch.xla_set_seed(seed, self._name)
