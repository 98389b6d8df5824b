"""Where this thread stands: inside which region, recording or replaying."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from distckpt.engine.parameters import Stale
    from distckpt.engine.region import Region


class Frame:
    """One replay under way on this thread; ``pins`` counts the pinned values it has handed out.

    ``refused`` is the error that ends it, see :func:`refuse`; ``stale`` the parameters that it finds changed.
    """

    __slots__ = ("outer", "pins", "refused", "region", "stale")

    def __init__(self, region: Region, outer: Any) -> None:
        self.region = region
        self.outer = outer
        self.pins = 0
        self.refused: Exception | None = None
        self.stale: Stale | None = None


class _Thread(threading.local):
    frame: Frame | Region | None = None  # innermost; a Region is a record, a Frame is a replay
    replaying: int = 0
    last_cpu_state: Any = None  # an rng.CpuState: what the last region found or left
    settling: Region | None = None  # it is replayed a second time, as the engine itself needs it
    entering: Region | None = None  # the user's contexts around its record or its replay are being entered


here = _Thread()


def region_here() -> Region | None:
    """The innermost region that this thread records or replays, or None."""
    frame = here.frame
    return frame.region if isinstance(frame, Frame) else frame


class Refusal(BaseException):
    """Ends a replay on its way to :func:`refuse`'s error; an ``except Exception`` of the user's lets it pass."""


def refuse(region: Region, error: Exception) -> NoReturn:
    """End the replay of ``region`` on this thread with ``error``, whatever its function catches.

    The function would go on with something else than the forward did.
    """
    frame = here.frame
    while frame is not None and not (type(frame) is Frame and frame.region is region):
        frame = frame.outer
    if type(frame) is not Frame:
        raise error
    frame.refused = frame.refused or error
    raise Refusal


def is_recomputing() -> bool:
    """True while this thread replays a region, False in every first forward.

    For metrics, counters and logging that must happen once per step::

        if not dc.is_recomputing():
            self.tokens_seen += x.numel()
    """
    return here.replaying > 0


def replaying(until: Region) -> Region | None:
    """The region of the innermost replay on this thread, not looking beyond the record of ``until``."""
    frame = here.frame
    while frame is not None and frame is not until:
        if type(frame) is Frame:
            return frame.region
        frame = frame.outer
    return None
