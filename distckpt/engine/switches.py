"""The two switches that override a region's own options, per context rather than per process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

early_stop: ContextVar[bool | None] = ContextVar("distckpt.early_stop", default=None)
debug: ContextVar[bool | None] = ContextVar("distckpt.debug", default=None)


@contextlib.contextmanager
def _switched(switch: ContextVar[bool | None], value: bool | None) -> Iterator[None]:
    token = switch.set(value)
    try:
        yield
    finally:
        switch.reset(token)


def set_checkpoint_early_stop(enable: bool) -> contextlib.AbstractContextManager[None]:
    """Decide for every region recorded in this context whether its replay may stop early.

    Needed around the forward only. Overrides ``early_stop=`` of each region; replays that happen later,
    also on another thread, see the value that the region was recorded under.
    """
    return _switched(early_stop, enable)


def set_checkpoint_debug_enabled(enabled: bool | None) -> contextlib.AbstractContextManager[None]:
    """Decide for every region recorded in this context whether it logs its operators.

    Overrides ``debug=`` of each region; ``None`` gives the decision back to them.
    """
    return _switched(debug, enabled)
