"""Hooks: what a region hands autograd for a tensor that it saves, and what it answers when that is asked for.

Note [Unfilled values]
    Most operators hand their inputs to the saved-tensor hook before their kernel runs, and those are ready.
    RReLU also hands over a noise tensor that its kernel has yet to fill (pytorch#193671), and neither its version
    nor the random state tells. So when a replay stops at the very last slot, what does not require grad among
    the last two saves is only given out after a look at who asks: for RReLU the region is replayed again, to its
    end.

Note [Gradients that add up]
    Autograd adds up gradients in place, but not while a dispatch mode is on (a selective region around, a counter of
    the user's). So the result of a gradient taken inside a region is the same to the bit, but at another version (see
    Note [Versions] in ``determinism.py``), when a mode was on in the record and is not in the replay, or the other way
    round. Nobody asks for modes before a version differs; then the region is replayed once more the other way, and
    only what differs then too was changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt._torch import (
    call_without_dynamo,
    current_node,
    dispatch_mode_is_on,
    dynamo_callback,
    graph_task_id,
    opaque_to_dynamo,
    queue_callback,
    skip_inner_frames,
    without_dispatch_modes,
)
from distckpt.engine.determinism import Verifier, mutated
from distckpt.engine.region import (
    Doubtful,
    Outdated,
    Region,
    Slot,
    current_session,
    describe,
    here,
    open_sessions,
)
from distckpt.engine.replay import replay
from distckpt.engine.stats import failed
from distckpt.engine.streams import owners as turns
from distckpt.engine.streams import waiting_for
from distckpt.errors import BatchedReplay, CheckpointError

_ref = weakref.ref


def is_engine_hook(pair: tuple[Any, Any]) -> bool:
    """Whether a saved-tensor hook pair is the engine's own, from a record or a replay of any kind."""
    return str(getattr(pair[1], "__module__", "")).startswith("distckpt.engine.")


def stays(saved: Any) -> Any:
    """Both hooks of a region whose saved tensors stay where they are: a traced or a reentrant one."""
    return saved


def packer(r: Region) -> Callable[[torch.Tensor], Slot]:
    """The pack hook of a record."""
    check = r.options.determinism_check
    add = r.refs.append
    if check == "default":

        def pack(x: torch.Tensor) -> Slot:
            slot = Slot()
            slot.value = None
            slot.meta = (x.shape, x.dtype, x.device, x._version)
            add(_ref(slot))
            return slot

    elif check == "none":

        def pack(x: torch.Tensor) -> Slot:
            slot = Slot()
            slot.value = None
            slot.meta = (None, None, None, x._version)
            add(_ref(slot))
            return slot

    else:
        verifier = r.verifier = Verifier(check)

        def pack(x: torch.Tensor) -> Slot:
            slot = Slot()
            slot.value = None
            slot.meta = (x.shape, x.dtype, x.device, x._version)
            add(_ref(slot))
            verifier.saw(x)
            return slot

    return pack


@opaque_to_dynamo
def unpack(r: Region, slot: Slot) -> Any:
    """The value autograd asks for; replays the region when the slot is empty. Drops it at its last use."""
    value = slot.value
    if value is None:
        # With compiled autograd this may run below a graph break; a replay is eager, as its record was.
        value = _value_of(r, slot) if dynamo_callback() is None else call_without_dynamo(_value_of, r, slot)
    elif r.session is None:
        slot.value = None
    else:
        r.session.asked(slot)
    if value._version != slot.meta[3]:
        value = _look_again(r, slot, value)
    return value


@opaque_to_dynamo
def unpack_as_torch(r: Region, slot: Slot) -> Any:
    """Torch's rule: within one backward a saved tensor is unpacked once, and each backward has its own values.

    When another backward left the value here (one runs inside the other), the first may have to replay again.
    """
    if slot.value is not None and type(r.backward) is int and graph_task_id() != r.backward:
        r.backward = None
    return unpack(r, slot)


def _look_again(r: Region, slot: Slot, value: Any) -> Any:
    if type(value) is Doubtful:
        value = _settle(r, slot, value)
    if not isinstance(value, Outdated) and value._version != slot.meta[3] and r.options.strict:
        value = _other_way(r, slot)
    if isinstance(value, Outdated):
        outdated = value.error(describe(r.fn, r.options))
        failed(r, outdated)
        raise outdated
    if value._version != slot.meta[3]:
        error = mutated(r, value, slot.meta)
        failed(r, error)
        raise error
    return value


def _value_of(r: Region, slot: Slot) -> Any:
    with r.lock if not turns else waiting_for(r.lock):
        value = slot.value  # another device thread may have replayed while this one waited
        while value is None:  # or have taken the value right after this one replayed
            refill(r)
            value = slot.value
        if r.session is None:
            slot.value = None
            # None or an int is what a replay without a session leaves there
            if graph_task_id() == -1 and (r.backward is None or type(r.backward) is int):
                r.clear()  # no backward will use, or end and release, the other values
        else:
            r.session.asked(slot)
    return value


def refill(r: Region) -> None:
    """Fill every living slot. Called under ``lock``."""
    task = graph_task_id()
    current = current_session() if open_sessions else None
    if current is not None:
        current.admit(r, task)
    elif not r.options.strict and task != -1 and r.backward == task and not here.settling:
        refuse_second_unpack()
    try:
        replay(r)
    except Exception as error:
        if type(error) is RuntimeError and "vmap" in str(error) and r.options.strict:
            batched = _batched(r, error)
            failed(r, batched)
            raise batched from error
        failed(r, error)
        raise
    r.backward = task if current is None else current
    if r.session is not None:
        r.session.replayed(r)
    elif current is None and task != -1 and len(r.refs) > 1:  # a single value is taken at once
        queue_callback(partial(_end_of_backward, _ref(r)))


def fill(r: Region) -> bool:
    """Replay now if a living slot is empty; whether it did. Without a session a value lasts until its first use.

    Raises:
        CheckpointError: the replay does not match the forward.
    """
    with r.lock if not turns else waiting_for(r.lock):
        empty = any(slot.value is None for slot in r.living())
        if empty:
            refill(r)
    return empty


def refuse_second_unpack(extra: str = "") -> None:
    """Torch's rule: within one backward, or one group of them, a saved tensor is unpacked once."""
    raise CheckpointError(
        f"torch.utils.checkpoint: Unpack is being triggered for a tensor that was already unpacked once. {extra}"
        "If you are calling ctx.saved_tensors in backward, make sure to do so only once."
    )


def _end_of_backward(ref: weakref.ref[Region]) -> None:
    # After a whole backward the graph is gone and the region with it; after a partial one it is still here.
    region = ref()
    if region is not None and region.session is None:
        region.clear()


def _batched(region: Region, error: Exception) -> BatchedReplay:
    return BatchedReplay(
        "vmap does not go through the replay of a region",
        where=describe(region.fn, region.options),
        why=str(error).split(". ")[0],
        fix="take single gradients instead of batched ones, and call the function plainly inside of vmap",
    )


def _settle(r: Region, slot: Slot, doubtful: Doubtful) -> Any:
    """The tensor behind a doubtful value, from a complete replay if its operator needs one."""
    node = current_node()
    if node is not None and not node.name().startswith("RreluWithNoise"):
        return doubtful.value
    with waiting_for(r.lock):
        r.early_stop = False
        settling, here.settling = here.settling, r
        try:
            value = None
            while value is None:  # another thread may take it first
                replay(r)
                value = slot.value
        finally:
            here.settling = settling
        if r.session is None:
            slot.value = None
    return value


class _Idle(TorchDispatchMode):
    """A mode that changes nothing by itself."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _other_way(r: Region, slot: Slot) -> Any:
    """The value of ``slot`` from a replay under a dispatch mode if none is on, and under none if one is."""
    with waiting_for(r.lock), without_dispatch_modes() if dispatch_mode_is_on() else _Idle():
        value = None
        while value is None:  # another thread may take it first
            replay(r)
            value = slot.value
        if type(value) is Doubtful:
            value = _settle(r, slot, value)
    if r.session is None:
        slot.value = None
    return value


skip_inner_frames(packer)
