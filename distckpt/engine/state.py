"""Where this thread stands: inside which region, recording or replaying."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distckpt.engine.region import Region


class Frame:
    """One replay under way on this thread; ``pins`` counts the pinned values it has handed out."""

    __slots__ = ("outer", "pins", "region")

    def __init__(self, region: Region, outer: Any) -> None:
        self.region = region
        self.outer = outer
        self.pins = 0


class _Thread(threading.local):
    frame: Frame | Region | None = None  # innermost; a Region is a record, a Frame is a replay
    replaying: int = 0
    last_cpu_state: Any = None  # the CPU state that the last region found or left
    settling: bool = (
        False  # a second replay that the engine itself needs, so its inputs may be unpacked again
    )


here = _Thread()


def region_here() -> Region | None:
    """The innermost region that this thread records or replays, or None."""
    frame = here.frame
    return frame.region if isinstance(frame, Frame) else frame


def is_recomputing() -> bool:
    """True while this thread replays a region, False in every first forward.

    For metrics, counters and logging that must happen once per step::

        if not dc.is_recomputing():
            self.tokens_seen += x.numel()
    """
    return here.replaying > 0
