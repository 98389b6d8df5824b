"""Ambient state that an operator reads besides its arguments, taken at record and re-entered for replay.

Default dtype, deterministic flags, attention backend choice, autocast of every device type in use, the device context,
and whether ``torch.fx`` traces. ContextVars travel with the region's own copy of the context; grad mode is always on in
a replay.

And the user's own contexts around record and replay: the ``context_fn`` pair and the debug log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from distckpt_backends import live

from distckpt._torch import (
    autocast_nesting,
    deterministic_algorithms,
    deterministic_warn_only,
    device_context,
    function_mode_depth,
    fx_tracing,
    is_any_autocast_enabled,
    sdp_readers,
    set_fx_tracing,
    set_sdp_priority,
    set_sdp_state,
)
from distckpt.engine.region import here

if TYPE_CHECKING:
    from distckpt.engine.diagnose import OpLog
    from distckpt.engine.region import ContextFn, Region


_default_dtype = torch.get_default_dtype
_flash, _efficient, _math, _cudnn, _priority = sdp_readers()

# What an inner `torch.autocast(kind)` without a dtype uses when no autocast is on around it.
_IDLE_DTYPE = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")}

Ambient = tuple[Any, ...]


def snapshot() -> Ambient:
    """The ambient state now; equal tuples mean equal state."""
    return (
        _default_dtype(),
        deterministic_algorithms(),
        deterministic_warn_only(),
        _flash(),
        _efficient(),
        _math(),
        _cudnn(),
        _priority(),
        _autocast() if is_any_autocast_enabled() else None,
        device_context() if function_mode_depth() else None,
        fx_tracing(),
    )


def _autocast() -> tuple[bool, tuple[tuple[str, bool, torch.dtype], ...]]:
    kinds = ["cpu", *(b.device_type for b in live() if b.capabilities.autocast)]
    states = tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)
    return torch.is_autocast_cache_enabled(), states


@contextlib.contextmanager
def entered(then: Ambient, now: Ambient) -> Iterator[None]:
    """Make the ambient state ``then`` inside the block, given that it is ``now`` outside."""
    with contextlib.ExitStack() as stack:
        if then[8] != now[8]:
            stack.enter_context(_autocast_entered(then[8]))
        if then[9] != now[9]:
            # A fresh context: re-entering the recorded instance would corrupt its exit state (pytorch#180423).
            stack.enter_context(torch.device(then[9] if then[9] is not None else "cpu"))
        try:
            _set(then, now)
            yield
        finally:
            put_back(then)
            _set(now, then)


def put_back(state: Ambient) -> None:
    """Undo what a function has set and not put back, because a replay stopped before its end."""
    now = snapshot()
    _set(state, now)
    if now[8] != state[8]:
        cache, kinds = _autocast()
        wanted: Any = state[8] or (cache, tuple((k, False, _IDLE_DTYPE.get(k, d)) for k, _, d in kinds))
        _set_autocast(*wanted)
    if now[9] != state[9]:
        torch.set_default_device(None)
        if (device_context() if function_mode_depth() else None) != state[9]:
            torch.set_default_device(state[9])


def _set(to: Ambient, of: Ambient) -> None:
    if to[0] != of[0]:
        torch.set_default_dtype(to[0])
    if to[1:3] != of[1:3]:
        torch.use_deterministic_algorithms(to[1], warn_only=to[2])
    if to[3:7] != of[3:7]:
        set_sdp_state(to[3:7])
    if to[7] != of[7]:
        set_sdp_priority(to[7])
    if to[10] != of[10]:
        set_fx_tracing(to[10])


@contextlib.contextmanager
def _autocast_entered(state: Any) -> Iterator[None]:
    held = _autocast()
    cache, kinds = state or (held[0], tuple((k, False, _IDLE_DTYPE.get(k, d)) for k, _, d in held[1]))
    with autocast_nesting():
        _set_autocast(cache, kinds)
        try:
            yield
        finally:
            _set_autocast(*held)


def _set_autocast(cache: bool, kinds: Any) -> None:
    for kind, enabled, dtype in kinds:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cache)


Context = AbstractContextManager[Any]


class Contexts:
    """Forward and recompute context of one region.

    They are entered and left by hand: an ``ExitStack`` and a generator around each doubled what a context costs.
    """

    __slots__ = ("_entered", "_forward", "_replay")

    def __init__(self, make: ContextFn | None, region: Region) -> None:
        forward, replay = make() if make is not None else (contextlib.nullcontext(), contextlib.nullcontext())
        self._forward: Context = _bound(forward, region)
        self._replay: Context = _bound(replay, region)
        # A debug log is around it, and names the region: so not beyond the record, or the two would hold each other.
        self._entered: Context | None = None

    def enter_forward(self, region: Region) -> None:
        """Enter before the record."""
        context = self._forward
        if region.log is not None:
            context = _logged(region.log.forward, context, region)
        _enter(context, region)
        self._entered = context

    def leave_forward(self, error: BaseException | None) -> bool:
        """Leave after the record; true when the context wants to swallow ``error``."""
        kind, trace = (None, None) if error is None else (type(error), error.__traceback__)
        context, self._entered = self._entered, None
        return (
            context is not None
            and bool(type(context).__exit__(context, kind, error, trace))
            and error is not None
        )

    def replaying(self, region: Region) -> Context:
        """Around one replay."""
        # made again where it serves one `with` alone: there may be more replays
        again = getattr(self._replay, "_recreate_cm", None)
        context = self._replay if again is None else again()
        return _Replaying(
            context if region.log is None else _logged(region.log.replay, context, region), region
        )


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
        _enter(context, region)
        stack.push(context)
        yield
