"""Stage: our wraps around the methods of one pipeline stage, and what is known about its regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from distckpt._torch_dist import BACKWARD, FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD, sharded_units, stage_ends
from distckpt.engine.region import Region
from distckpt.engine.stats import held, keys
from distckpt.ranks.pipeline.limit import Ahead
from distckpt.ranks.pipeline.order import Order
from distckpt.ranks.pipeline.report import StageReport
from distckpt.ranks.pipeline.session import MicroBatch

WRAPPED = (
    "clear_runtime_states",
    "forward_one_chunk",
    "get_bwd_recv_ops",
    "backward_one_chunk",
    "backward_weight_one_chunk",
)


class Stage:
    """Sessions of one stage's micro-batches, opened and closed by the stage's own calls.

    ``limit`` is how many bytes may be held ahead of their gradient, or what else says how much.
    """

    def __init__(self, stage: Any, order: Order, limit: int | Ahead) -> None:
        self.stage = stage
        self.index: int = stage.stage_index
        self.order = order
        self.limit = limit
        self.sessions: dict[int, MicroBatch] = {}
        self.posted: set[int] = set()  # micro-batches whose gradient is being received
        self.sizes: dict[
            tuple[int, int], int
        ] = {}  # bytes of a region's values, by its place; kept over steps
        self.outermost: int | None = None  # outermost regions of one forward
        self.early = False
        self.why_unseen: Callable[[], str] | None = None  # None: nobody looks for waits
        self.make_room: Callable[[Stage], None] | None = (
            None  # before an input half; None: values may pile up
        )
        self.for_weights = 0  # bytes that the last input half left for its weight half
        self.left_by_torch: int | None = None  # as in the session of that micro-batch
        self.weights_done: set[int] = set()  # micro-batches whose weight half was run before its turn
        self.report = StageReport(self.index)
        self._fixed: set[int] | None = None
        self._sharded = True
        self._before: dict[str, Any] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    # Wraps

    def attach(self) -> None:
        """Put the wraps on the stage instance; its class and other stages stay as they are."""
        for name in WRAPPED:
            if name in self.stage.__dict__:
                self._before[name] = self.stage.__dict__[name]
            self._originals[name] = getattr(self.stage, name)
            setattr(self.stage, name, self._wrap(name, self._originals[name]))
        self.stage._distckpt_stage = self

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        for name in WRAPPED:
            if name in self._before:
                setattr(self.stage, name, self._before[name])
            else:
                delattr(self.stage, name)
        del self.stage._distckpt_stage
        self.forget()

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        ours = getattr(self, f"_{name}")

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

        return wrapped

    def _clear_runtime_states(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Every schedule calls this for each of its stages before anything else in a step.
        self.order.restart()
        self.forget()
        self.report = StageReport(self.index)
        self._fixed = None
        self._sharded = bool(sharded_units(self.stage.submod))
        return original(*args, **kwargs)

    def _forward_one_chunk(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        if not self.stage.has_backward or not torch.is_grad_enabled():
            return original(index, *args, **kwargs)
        self.order.arrive((FORWARD, self.index, index))
        session = MicroBatch(self, index, self.order.consumes_now(self.index, index))
        with session:
            out = original(index, *args, **kwargs)
        self.sessions[index] = session
        self.outermost = session.outermost
        session.ends_with_region = session.made(out)
        return out

    def _get_bwd_recv_ops(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        ops = original(index, *args, **kwargs)
        if ops:
            self.posted.add(index)
        return ops

    def _backward_one_chunk(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        full = kwargs.get("full_backward", args[1] if len(args) > 1 else True)
        if not self.stage.has_backward:
            return original(index, *args, **kwargs)
        self.order.arrive((BACKWARD if full else INPUT_BACKWARD, self.index, index))
        session = self.sessions.get(index)
        if session is None:
            return original(index, *args, **kwargs)
        if index in self.posted or not self.order.actions:  # nobody looked at what could be replayed
            self.posted.discard(index)
            session.late = self.why_unseen() if self.why_unseen is not None else None
        whole = (
            full or self.stage.dw_builder is not None
        )  # a weight function of the stage's own needs no graph
        if whole:
            session.begin_whole()
        elif session.groups:
            if self.make_room is not None:
                self.make_room(self)
            session.begin_input_half(*stage_ends(self.stage, index))
        try:
            out = original(index, *args, **kwargs)
        except BaseException:
            self._close(index)
            raise
        if whole:
            self._close(index)
        else:
            session.end_input_half()
            if (
                session.groups and self.index > 0
            ):  # the first stage leaves all of its backward to the weight half
                self.for_weights, self.left_by_torch = session.weight_bytes, session.left_by_torch
            waiting = sum(s.weight_bytes for s in self.sessions.values())
            self.report.weight_bytes = max(self.report.weight_bytes, waiting)
        return out

    def _backward_weight_one_chunk(
        self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.stage.has_backward:
            return original(index, *args, **kwargs)
        self.order.arrive((WEIGHT_BACKWARD, self.index, index))
        if index in self.weights_done:
            self.weights_done.discard(index)
            return None
        try:
            return original(index, *args, **kwargs)
        finally:
            self._close(index)

    def weight_half_ready(self, index: int) -> bool:
        """Whether :meth:`weight_half_now` may be called. FSDP gathers, and DDP reduces, for a half in its turn only."""
        session = self.sessions.get(index)
        alone = not self._sharded and not isinstance(self.stage.submod, DistributedDataParallel)
        return session is not None and session.halved and alone

    def weight_half_now(self, index: int, last: bool) -> None:
        """Run a weight half, ``last`` of its stage or not, before its turn; nothing is left to do in its turn."""
        try:
            self._originals["backward_weight_one_chunk"](index, last_backward=last)
        finally:
            self._close(index)
        self.weights_done.add(index)
        self.report.weights_early += 1

    def _close(self, index: int) -> None:
        session = self.sessions.pop(index, None)
        if session is not None:
            session.release()

    def forget(self) -> None:
        """Close what a step left open (it failed, or had no backward)."""
        for index in list(self.sessions):
            self._close(index)
        self.posted.clear()
        self.weights_done.clear()

    # What the sessions ask

    def keeps(self, session: MicroBatch, place: int) -> bool:
        """Whether an outermost region is better a plain call, as its backward is what this rank computes next.

        Its values then exist ahead of their gradient just as after an early replay, so the same limit holds. They
        live beside what the loss needs, which those of a replay do not: none is kept without a limit that allows it.
        """
        if not session.consumed_now:
            return False
        if isinstance(self.limit, Ahead):
            return self.limit is Ahead.ALL
        if self.outermost is None or place >= self.outermost:
            return False
        sizes = [self.group_size(p) for p in range(place, self.outermost)]
        return all(s is not None for s in sizes) and sum(s or 0 for s in sizes) <= self.limit

    def room(self, session: MicroBatch) -> int | None:
        """Bytes that may be replayed ahead for ``session``, beside what it keeps; None: not counted."""
        if isinstance(self.limit, Ahead):
            return None
        kept = range(len(session.groups), session.outermost)
        return self.limit - sum(self.group_size(place) or 0 for place in kept)

    def group_size(self, place: int) -> int | None:
        """Bytes of an outermost region and those inside it, if every one was seen."""
        sizes = [size for (at, _), size in self.sizes.items() if at == place]
        return sum(sizes) if sizes else None

    def replayed(self, session: MicroBatch, region: Region, place: int, label: str) -> None:
        """Count a replay, and learn how large the region's values are."""
        self.report.replays[session.index, label] += 1
        if self.early:
            self.report.early[session.index, label] += 1
        elif session.late is not None:
            self.report.lazy[session.late] += 1
        if self.limit and not isinstance(self.limit, Ahead):
            where = session.place(region)
            size = held([region], self.fixed())
            self.sizes[where] = max(size, self.sizes.get(where, 0))
            if self.early:
                session.ahead += size

    def fixed(self) -> set[int]:
        """The memory of the stage's parameters and buffers; looked up once per step unless it may move meanwhile."""
        if self._fixed is None or self._sharded:
            module = self.stage.submod
            self._fixed = keys([*module.parameters(), *module.buffers()])
        return self._fixed

    def units(self) -> dict[torch.nn.Module, tuple[str, bool]]:
        """The sharded units of the stage: name, and whether gathered now."""
        return sharded_units(self.stage.submod) if self._sharded else {}
