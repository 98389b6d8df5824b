"""The contexts that a region's record and replays run in: the user's ``context_fn`` pair and the debug log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distckpt.engine.state import here

if TYPE_CHECKING:
    from types import TracebackType

    from distckpt.engine.oplog import OpLog
    from distckpt.engine.options import ContextFn
    from distckpt.engine.region import Region

Context = AbstractContextManager[Any]


class Contexts:
    """Forward and recompute context of one region.

    They are entered and left by hand: an ``ExitStack`` and a generator around each doubled what a context costs.
    """

    __slots__ = ("_forward", "_replay")

    def __init__(self, make: ContextFn | None, region: Region) -> None:
        forward, replay = make() if make is not None else (contextlib.nullcontext(), contextlib.nullcontext())
        self._forward: Context = _bound(forward, region)
        self._replay: Context = _bound(replay, region)
        if region.log is not None:
            self._forward = _logged(region.log.forward, self._forward, region)
            self._replay = _logged(region.log.replay, self._replay, region)

    def enter_forward(self, region: Region) -> None:
        """Enter before the record."""
        _enter(self._forward, region)

    def leave_forward(self, error: BaseException | None) -> bool:
        """Leave after the record; true when the context wants to swallow ``error``."""
        kind, trace = (None, None) if error is None else (type(error), error.__traceback__)
        return bool(type(self._forward).__exit__(self._forward, kind, error, trace)) and error is not None

    def replaying(self, region: Region) -> Context:
        """Around one replay."""
        # made again where it serves one `with` alone: there may be more replays
        again = getattr(self._replay, "_recreate_cm", None)
        return _Replaying(self._replay if again is None else again(), region)


class _Replaying:
    """One replay in the recompute context of a region."""

    __slots__ = ("_context", "_region")

    def __init__(self, context: Context, region: Region) -> None:
        self._context = context
        self._region = region

    def __enter__(self) -> None:
        _enter(self._context, self._region)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return type(self._context).__exit__(self._context, kind, error, trace)


def _bound(context: Any, region: Region) -> Context:
    # Selective contexts of ours ask the region about its flavour, its generators and the user's hooks.
    bind = getattr(context, "bind_region", None)
    return context if bind is None else bind(region)


def _enter(context: Context, region: Region) -> None:
    """Enter the user's context. A selective one that it enters in here finds the region that it serves."""
    kind = type(context)
    try:
        enter, _ = kind.__enter__, kind.__exit__
    except AttributeError:
        raise TypeError(
            f"{kind.__qualname__!r} object does not support the context manager protocol"
        ) from None
    before = here.entering
    here.entering = region if region.options.strict else None
    try:
        enter(context)
    finally:
        here.entering = before


@contextlib.contextmanager
def _logged(log: OpLog, context: Context, region: Region) -> Iterator[None]:
    """``context`` inside of a debug log, which begins anew."""
    log.entries.clear()
    with log.recording(), contextlib.ExitStack() as stack:
        again = getattr(context, "_recreate_cm", None)
        context = context if again is None else again()
        _enter(context, region)
        stack.push(context)
        yield
