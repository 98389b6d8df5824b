"""Stage: our wraps around the methods of one pipeline stage, the sessions of its micro-batches, and split backwards.

Note [Split backward]
    Torch takes the gradients of a stage's inputs first and those of its weights later. The first half runs every node
    between outputs and inputs. The second starts again from those of them from which a way leads to a weight and not
    to an input: a linear layer runs twice, a GELU or a dropout once. What a node of the second kind has saved
    is not needed any more once it ran, though its graph lives on. (``get_param_groups`` in
    ``torch.distributed.pipelining`` finds the same nodes from the other end.) When a weight is used in two places
    torch goes all the way from one to the other, so then any node may run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel

from distckpt._torch import current_node
from distckpt._torch_dist import BACKWARD, FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD, sharded_units, stage_ends
from distckpt.engine.inputs import tensors
from distckpt.engine.region import Region, Slot, describe, here, region_here
from distckpt.engine.sessions import Session
from distckpt.engine.stats import held, held_storages, input_keys, keys, value_storages
from distckpt.ranks.pipeline.schedule import Ahead, Order, StageReport


class SplitBackward:
    """Tells of a node that runs in the input half whether it runs again in the weight half."""

    def __init__(
        self, outputs: Iterable[Any], inputs: Iterable[Any], weights: Iterable[torch.Tensor]
    ) -> None:
        roots = [node for out in outputs if (node := _maker(out)) is not None]
        ends = {id(t): (True, False) for t in inputs} | {id(t): (False, True) for t in weights}
        reached = _reached(roots, ends)
        starts: dict[Any, list[Any]] = {}  # of a node that runs twice, where its ways to weights begin
        for node, (inp, _) in reached.items():
            below = [n for n in _below(node) if reached[n] == (False, True)]
            if inp and below:
                starts[node] = below
        self._again = set(starts)
        users: dict[Any, int] = {}
        for below in starts.values():
            for leaf in _leaves(below):
                users[leaf] = users.get(leaf, 0) + 1
        self._any = any(count > 1 for count in users.values())

    def __call__(self, node: Any) -> bool:
        return self._any or node in self._again


def _maker(out: Any) -> Any:
    """The node that made an output, which may be given by its edge in the graph."""
    if isinstance(out, GradientEdge):
        return out.node
    return out.grad_fn if isinstance(out, torch.Tensor) else None


def _below(node: Any) -> list[Any]:
    return [edge[0] for edge in node.next_functions if edge[0] is not None]


def _reached(roots: list[Any], ends: dict[int, tuple[bool, bool]]) -> dict[Any, tuple[bool, bool]]:
    """Of every node below ``roots``: whether a way leads to an input, and whether one leads to a weight."""
    known: dict[Any, tuple[bool, bool]] = {}
    todo = list(roots)
    while todo:
        node = todo[-1]
        below = _below(node)
        missing = [n for n in below if n not in known]
        if missing and node not in known:
            todo += missing
            continue
        todo.pop()
        if node not in known:
            inp, weight = ends.get(id(getattr(node, "variable", None)), (False, False))
            known[node] = inp or any(known[n][0] for n in below), weight or any(known[n][1] for n in below)
    return known


def _leaves(nodes: list[Any]) -> set[Any]:
    """The nodes without successors below ``nodes``."""
    seen: set[Any] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += _below(node)
    return {node for node in seen if hasattr(node, "variable")}


class MicroBatch(Session):
    """Regions recorded inside share one replay each, whichever backward asks first."""

    def __init__(self, stage: Stage, index: int, consumed_now: bool) -> None:
        super().__init__()
        self.stage = stage
        self.index = index
        self.consumed_now = consumed_now  # its whole backward comes right after this forward
        self.groups: list[
            list[weakref.ref[Region]]
        ] = []  # an outermost region, then those recorded inside it
        self.kept = 0  # outermost regions that were plain calls
        self.weight_bytes = 0  # after the input half, of values that the weight half needs
        self.left_by_torch = (
            0  # what torch's weight half would leave behind (Note [Values that wait for weights])
        )
        self.halved = False  # the input half is over
        self.late: str | None = None  # why nothing was replayed before the gradient, where nobody could
        self.ahead = 0  # bytes that early replays made, at least as much as they hold
        self.ends_with_region = False  # known when the forward is over
        self._around: weakref.WeakKeyDictionary[Region, weakref.ref[Region]] = weakref.WeakKeyDictionary()
        self._keeping = False
        self._whole = False
        self._again: SplitBackward | None = None  # while the input half runs
        self._used: tuple[Any, list[Slot]] = (None, [])
        self._twice: set[Any] = set()  # nodes of regions that run in both halves
        self._dropped: dict[
            int, int
        ] = {}  # storages of values that one half has used and the other does not need
        self._inputs: set[int] = set()
        self._last: list[weakref.ref[torch.Tensor]] = []

    def call(self, record: Any, fn: Any, args: Any, kwargs: Any, options: Any) -> Any:
        """Make the call a region, or keep it: a plain call inside which nothing is a region."""
        if self._keeping:
            return fn(*args, **kwargs)
        if here.frame is not None:
            return record(fn, args, kwargs, options)
        place = self.outermost
        if self.stage.keeps(self, place):
            self.kept += 1
            self.stage.report.kept[self.index, _label(place, 0, fn, options)] += 1
            self._keeping = True
            try:
                out = fn(*args, **kwargs)
            finally:
                self._keeping = False
        else:
            out = record(fn, args, kwargs, options)
        self._last = [weakref.ref(t) for t in tensors(out)]
        return out

    def enroll(self, region: Region) -> None:
        super().enroll(region)
        around = region_here()
        if region.inner and self.groups:
            self.groups[-1].append(weakref.ref(region))
            if around is not None:
                self._around[region] = weakref.ref(around)
        else:
            self.groups.append([weakref.ref(region)])

    def replayed(self, region: Region) -> None:
        place, within = self.place(region)
        self.stage.replayed(self, region, place, _label(place, within, region.fn, region.options))

    def asked(self, slot: Slot) -> None:
        """Drop a value at its last use, as without a session: in a whole backward that is the first one.

        In the input half of a split one it depends on the node.
        A slot belongs to one node. A node that does not run again in the weight half is done with its values when
        another node asks; it may ask twice for one.
        """
        if self._whole:
            slot.value = None
        if self._again is None:
            return
        node = current_node()
        if node is not self._used[0]:
            self._drop_used()
            self._used = node, []
        if node is not None and not self._again(node):
            self._used[1].append(slot)
        elif node is not None:
            self._twice.add(node)

    def _drop_used(self) -> None:
        for slot in self._used[1]:
            if slot.value is not None:
                self._dropped.update(value_storages(slot.value))
            slot.value = None
        self._used = None, []

    @property
    def outermost(self) -> int:
        """How many outermost regions this forward has called so far."""
        return len(self.groups) + self.kept

    def made(self, output: Any) -> bool:
        """Whether the last outermost region made all that the stage returned, or what that is a view of."""
        made = [t for ref in self._last if (t := ref()) is not None]
        return all(any(o is t or (o._is_view() and o._base is t) for t in made) for o in tensors(output))

    def replayable(self, region: Region) -> bool:
        """Whether a replay of ``region`` finds its inputs, which are values of the region around it if there is one."""
        ref = self._around.get(region)
        around = ref() if ref is not None else None
        return around is None or all(slot.value is not None for slot in around.living())

    def place(self, region: Region) -> tuple[int, int]:
        """Which outermost region ``region`` is or lies in, and its number inside."""
        for place, group in enumerate(self.groups):
            for within, ref in enumerate(group):
                if ref() is region:
                    return place, within
        raise LookupError("a region of another session")

    def regions(self) -> list[Region]:
        """Those that can still be asked for a value."""
        found = (ref() for group in self.groups for ref in group)
        return [region for region in found if region is not None and region.session is self]

    def newest_first(self) -> list[Region]:
        """The order in which a backward comes to them; what lies inside a region comes after it."""
        order = [ref for group in reversed(self.groups) for ref in (group[0], *reversed(group[1:]))]
        return [region for ref in order if (region := ref()) is not None and region.session is self]

    def held(self) -> int:
        """Bytes of recomputed values, parameters and inputs not counted."""
        return held(self.regions(), self.stage.fixed())

    def begin_whole(self) -> None:
        """The stage is about to take all its gradients at once."""
        self._whole = True

    def begin_input_half(self, outputs: Iterable[Any], inputs: Iterable[Any]) -> None:
        """The stage is about to take the gradients of its inputs only."""
        self._again = SplitBackward(outputs, inputs, self.stage.stage.submod.parameters())
        self._inputs = {key for region in self.regions() if not region.inner for key in input_keys(region)}

    def end_input_half(self) -> None:
        """Count what the weight half needs, and what it does not."""
        self._drop_used()
        self._again = None
        waiting = held_storages(self.regions(), self.stage.fixed())
        self.weight_bytes = sum(waiting.values())
        known = self._inputs | self.stage.fixed() | waiting.keys()
        dropped = sum(size for key, size in self._dropped.items() if key not in known)
        self.left_by_torch = dropped * len(self._twice) // max(1, len(self.groups))
        self._twice, self._dropped, self._inputs = set(), {}, set()  # nodes hold their graph
        self.halved = True


def _label(place: int, within: int, fn: Any, options: Any) -> str:
    name = describe(fn, options).removeprefix("region ").split(" (")[0]
    return f"{place}.{within} {name}" if within else f"{place} {name}"


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
