"""Counts of what the engine did, for tests, reports and people; and who is told when a replay fails."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distckpt.engine.region import Region


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals of this process since its start. Read them before and after, and subtract.

    ``regions`` counts records, ``replays`` counts recomputations (an early-stopped one counts as one).
    Plain integers without a lock: two device threads may lose a count, so they report, never decide.
    """

    regions: int = 0
    replays: int = 0


counters = Counters()

FailureListener = Callable[[str, Exception], None]

# Replaced, never changed in place: a failing thread sees either the old or the new tuple.
_listeners: tuple[FailureListener, ...] = ()


def on_failed_replay(listener: FailureListener) -> Callable[[], None]:
    """Call ``listener(region, error)`` when a replay raises, on its thread, before the error goes on.

    ``region`` is a description for people. The listener must not raise.

    Returns:
        A function that takes the listener off; calling it twice is harmless.
    """
    global _listeners
    _listeners = (*_listeners, listener)

    def remove() -> None:
        global _listeners
        _listeners = tuple(known for known in _listeners if known is not listener)

    return remove


def failed(region: Region, error: Exception) -> None:
    """Tell the listeners that a replay of ``region`` raised ``error``."""
    if not _listeners:
        return
    from distckpt.engine.region import describe

    with contextlib.suppress(
        Exception
    ):  # the description runs user code (__qualname__), and the error matters more
        place = describe(region.fn, region.options)
        for listener in _listeners:
            listener(place, error)
