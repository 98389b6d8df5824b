"""The contexts that a region's record and replays run in: the user's ``context_fn`` pair and the debug log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distckpt.engine.options import ContextFn
    from distckpt.engine.region import Region


class Contexts:
    """Forward and recompute context of one region."""

    def __init__(self, make: ContextFn | None, region: Region) -> None:
        pair = make() if make is not None else (contextlib.nullcontext(), contextlib.nullcontext())
        self._forward: Any
        self._forward, self._replay = pair
        self._log = region.log
        # Selective contexts of ours ask the region about its flavour, its generators and the user's hooks.
        for context in pair:
            bind = getattr(context, "bind_region", None)
            if bind is not None:
                bind(region)
        self._entered: contextlib.ExitStack | None = None

    def enter_forward(self) -> None:
        """Enter before the record."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log.forward.recording())
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
    def replaying(self) -> Iterator[None]:
        """Around one replay."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                self._log.replay.entries.clear()
                stack.enter_context(self._log.replay.recording())
            stack.enter_context(self._replay)
            yield
