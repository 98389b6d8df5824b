"""Turn: which replay may move a random generator, or the buffers of a module, now.

Note [Turns]
    A replay that draws rewinds generators that the whole process shares, and puts them back. Two at once would draw
    each other's numbers, so a replay takes a turn with every generator that it moves, and others wait for those. A
    replay that moves none takes none. The same goes for modules whose buffers or parameters a replay exchanges. It asks
    for all of it at once, so that two replays do not wait for each other. A turn belongs to a replay and not to its
    thread: a backward started inside it may replay regions on other threads (autograd changes threads for other
    devices, and where gradients are nested more than 60 deep), and they take their turns within that one. Autograd
    carries the turn there, in its thread state.

    Who waits for a turn may hold the lock of a region. So who has a turn never waits for a region: when another thread
    is replaying that one, it replays it as well, and both compute the same values.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from typing import Any

from distckpt._torch import tls_get, tls_set

_KEY = "distckpt.turn"
_changed = threading.Condition()

owners: dict[str, Turn] = {}
"""Whose turn it is, by the name of the generator or module; empty when no replay moves any."""


class Turn:
    """One replay's turn with some generators and modules."""

    __slots__ = ("before", "outer", "over")

    def __init__(self, names: Iterable[str]) -> None:
        """Wait until nobody else has a turn with one of these."""
        self.over = False
        self.outer = current()
        with _changed:
            _changed.wait_for(lambda: all(self._inside(owners.get(name)) for name in names))
            self.before = {name: owners.get(name) for name in names}
            owners.update(dict.fromkeys(names, self))
        tls_set(_KEY, self)

    def _inside(self, owner: Turn | None) -> bool:
        turn: Turn | None = self
        while owner is not None and turn is not None and turn is not owner:
            turn = turn.outer
        return turn is not None

    def end(self) -> None:
        """Let the next one have its turn. On the thread that began it."""
        self.over = True
        with _changed:
            for name, owner in self.before.items():
                if owner is None:
                    owners.pop(name, None)
                else:
                    owners[name] = owner
            _changed.notify_all()
        tls_set(_KEY, self.outer)


def current() -> Turn | None:
    """The turn that this thread, or the backward that it works for, is inside of."""
    turn: Turn | None = tls_get(_KEY)
    return None if turn is None or turn.over else turn


@contextlib.contextmanager
def _if_free(lock: Any):
    free = lock.acquire(blocking=False)
    try:
        yield
    finally:
        if free:
            lock.release()


def waiting_for(lock: Any) -> contextlib.AbstractContextManager[Any]:
    """``lock`` of a region; without waiting for it inside a turn."""
    return lock if not owners or current() is None else _if_free(lock)


def _forked() -> None:
    global _changed
    _changed = threading.Condition()
    owners.clear()  # the other replays stayed in the parent


os.register_at_fork(after_in_child=_forked)
