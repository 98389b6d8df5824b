"""Session: which consumers of recomputed values share one replay.

Note [Sessions]
    Without a session one backward is one session: a replay is made when a slot is first asked for, each value is
    dropped at its first use, and what nobody used is dropped when that backward ends. A value that is asked for
    again is recomputed again; the replay is exact, so the second copy equals the first.

    A session keeps the values instead, so that several backward passes (the input half and the weight half of a split
    backward), or a replay fired before the gradient arrives, use one replay. They are freed with their part of
    the graph, or by ``release()``. Autograd copies the torch thread state to its device threads, and the
    current session travels in it.

    A region that was recorded in a session belongs to it wherever it is replayed; the session need not be current
    then. The methods ``call``, ``enroll``, ``replayed`` and ``asked`` are where a subclass looks on.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from distckpt._torch import tls_set
from distckpt.engine.hooks import fill, refuse_second_unpack
from distckpt.engine.region import SESSION, Region, Slot, current_session, here, open_sessions
from distckpt.errors import SessionError


class Session(contextlib.AbstractContextManager["Session"]):
    """Regions recorded or consumed inside ``with session:`` share one replay each. May be entered many times."""

    def __init__(self) -> None:
        self._regions: list[weakref.ref[Region]] = []
        self._outer: list[Session | None] = []
        self._released = False

    def __enter__(self) -> Session:
        if self._released:
            raise SessionError("this session was released", fix="open a new one with dc.session()")
        self._outer.append(current_session())
        tls_set(SESSION, self)
        open_sessions.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        open_sessions.remove(self)
        tls_set(SESSION, self._outer.pop())

    def call(self, record: Any, fn: Any, args: Any, kwargs: Any, options: Any) -> Any:
        """A region's call inside the block; ``record(fn, args, kwargs, options)`` makes it a region."""
        return record(fn, args, kwargs, options)

    def enroll(self, region: Region) -> None:
        region.session = self
        region.inner = here.frame is not None
        self._regions.append(weakref.ref(region))

    def replayed(self, region: Region) -> None:
        """Every living slot of ``region`` has just been filled."""

    def asked(self, slot: Slot) -> None:
        """Autograd was handed the value of ``slot``, which stays there."""

    def admit(self, region: Region, task: int) -> None:
        """A region that is about to be replayed while this session is current."""
        if region.session is None and not self._released:
            self.enroll(region)

    def replay(self) -> int:
        """Replay every region of the session now that has values to give, outermost first.

        Returns:
            How many regions were replayed.

        Raises:
            SessionError: after ``release()``.
            CheckpointError: a replay does not match its forward.
        """
        if self._released:
            raise SessionError("a released session cannot replay", fix="call replay() before release()")
        count = 0
        for ref in list(self._regions):
            region = ref()
            if region is not None and region.session is self:
                count += fill(region)
        return count

    def release(self) -> None:
        """Drop every value of the session. A later use replays again, as without a session.

        Raises:
            SessionError: the session was released before.
        """
        if self._released:
            raise SessionError("a session is released once", fix="remove the second release()")
        self._released = True
        for ref in self._regions:
            region = ref()
            if region is not None and region.session is self:
                region.session = None
                region.clear()
        self._regions.clear()


class GraphExecGroup(Session):
    """Torch's group: several backward calls over disjoint parts of the graph share one replay per region.

    A value is dropped at its use, so two calls that need the same one are an error. Ignored by reentrant regions.
    """

    def __enter__(self) -> GraphExecGroup:
        inside = current_session()
        if isinstance(inside, GraphExecGroup):
            raise RuntimeError(f"GraphExecGroup contexts cannot be nested. Already inside group {inside}")
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for ref in self._regions:
            region = ref()
            if region is not None:
                region.clear()
        self._regions.clear()

    @classmethod
    def _get_current_group(cls) -> GraphExecGroup | None:
        """The group in force; torch's own engine asks by this name."""
        found = current_session()
        return found if isinstance(found, GraphExecGroup) else None

    def enroll(self, region: Region) -> None:
        """Recording under a group binds nothing: torch's group is about backward calls only."""

    def admit(self, region: Region, task: int) -> None:
        if region.backward is self:
            refuse_second_unpack(
                "Performing two backward calls that overlap (i.e. require the same saved activation in order to "
                "compute gradients) is not allowed while under the torch.utils.checkpoint.GraphExecGroup context. "
            )
        self._regions.append(weakref.ref(region))


def session() -> Session:
    """A new session: ``with dc.session() as s: ...``; then ``s.replay()`` and ``s.release()``."""
    return Session()
