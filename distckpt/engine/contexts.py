"""The contexts that a region's record and replays run in: the user's ``context_fn`` pair and the debug log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distckpt.engine.state import here

if TYPE_CHECKING:
    from distckpt.engine.options import ContextFn
    from distckpt.engine.region import Region


def _bound(context: Any, region: Region) -> Any:
    # Selective contexts of ours ask the region about its flavour, its generators and the user's hooks.
    bind = getattr(context, "bind_region", None)
    return context if bind is None else bind(region)


@contextlib.contextmanager
def _entering(region: Region) -> Iterator[None]:
    """A selective context that the user's own context enters in here finds the region that it serves."""
    before = here.entering
    here.entering = region if region.options.strict else None
    try:
        yield
    finally:
        here.entering = before


class Contexts:
    """Forward and recompute context of one region."""

    def __init__(self, make: ContextFn | None, region: Region) -> None:
        pair = make() if make is not None else (contextlib.nullcontext(), contextlib.nullcontext())
        self._forward, self._replay = (_bound(context, region) for context in pair)
        self._log = region.log
        self._entered: contextlib.ExitStack | None = None

    def enter_forward(self, region: Region) -> None:
        """Enter before the record."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log.forward.recording())
            with _entering(region):
                stack.enter_context(self._forward)
            self._entered = stack.pop_all()

    def leave_forward(self, error: BaseException | None) -> bool:
        """Leave after the record; true when the context wants to swallow ``error``."""
        stack, self._entered = self._entered, None
        if stack is None:
            return False
        if error is None:
            stack.close()
            return False
        return bool(stack.__exit__(type(error), error, error.__traceback__))

    @contextlib.contextmanager
    def replaying(self, region: Region) -> Iterator[None]:
        """Around one replay."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                self._log.replay.entries.clear()
                stack.enter_context(self._log.replay.recording())
            # made again where it serves one `with` alone: there may be more replays
            again = getattr(self._replay, "_recreate_cm", None)
            with _entering(region):
                stack.enter_context(self._replay if again is None else again())
            yield
