"""Region: one checkpointed call, from its record to its last replay.

The region is held by the graph of its own outputs (through :meth:`Region.unpack`) and by nothing else, so it dies
with that graph. It owns what a replay needs: inputs, RNG stash, ambient state, context, buffers, pins.
"""

from __future__ import annotations

import weakref
from contextvars import Context
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from distckpt._torch import (
    call_without_dynamo,
    dynamo_callback,
    graph_task_id,
    opaque_to_dynamo,
    queue_callback,
)
from distckpt.engine import ambient, rng, sessions
from distckpt.engine.barrier import Tie
from distckpt.engine.buffers import Holders
from distckpt.engine.closure import Captured, Names
from distckpt.engine.doubt import Doubtful, settle
from distckpt.engine.events import failed
from distckpt.engine.mismatch import mutated
from distckpt.engine.modes import other_way
from distckpt.engine.options import Options
from distckpt.engine.parameters import ModuleState, Outdated
from distckpt.engine.replay import last_living, replay
from distckpt.engine.slot import Slot
from distckpt.engine.traced import Traced
from distckpt.engine.turns import owners as turns
from distckpt.engine.turns import waiting_for
from distckpt.engine.verify import Verifier
from distckpt.errors import BatchedReplay

_ref = weakref.ref


class Region:
    """One checkpointed call. Made, recorded and closed in ``record.py``."""

    # Most regions need few of these; a class default costs nothing per call.
    fn: Any
    args: list[Any]
    kwargs: Any = None
    captured: list[Captured] | None = None  # what its functions read by name
    plain: tuple[Names, list[Any]] | None = (
        None  # the same of a function that reads no tensors and no functions
    )
    repeats = False  # the call names one thing several times
    options: Options
    refs: list[weakref.ref[Slot]]
    lock: Any
    context: Context
    ambient: ambient.Ambient
    early_stop: bool
    outer: Any = None
    closed = False
    # until the record ends: the modules that it reaches, and the parameters that the call holds by themselves
    reached: tuple[Holders | None, list[Parameter] | None] | None = None
    parameters: ModuleState | None = None  # after it: what those were
    buffers: Any = None
    rng_before: Any = None  # the CPU state, until the record ends
    stash: rng.Stash | None = None  # other streams, until the record ends
    draws: list[rng.Draw] | None = None  # after it: what the forward drew
    idle_cpu: Any = (
        None  # the CPU state, when it is where it was: perhaps drawn from, and put back by the function
    )
    idle: list[rng.Draw] | None = None  # other streams that are where they were
    pins: list[Any] | None = None
    kept: Any = None  # what selective contexts keep for it
    session: sessions.Session | None = None
    inner = False  # in a session: whether the record lies in that of another region
    backward: Any = None  # the graph task or session of the last replay
    replay_context: Any = None
    log: Any = None
    verifier: Verifier | None = None
    tie: Tie | None = None
    traced: Traced | None = (
        None  # inside a graph that is being traced: nothing is dropped here, nothing replayed
    )
    pauses_script = False  # while it is recorded: TorchScript optimises outside of it
    scripted: int | None = None  # in a thread that runs TorchScript: how many optimised graphs the record ran
    # under the user's hooks: what the inputs were at the record and before the last replay; autograd checks no versions
    marks: Any = None

    @opaque_to_dynamo
    def unpack(self, slot: Slot) -> Any:
        """The value autograd asks for; replays the region when the slot is empty. Drops it at its last use."""
        value = slot.value
        if value is None:
            # With compiled autograd this may run below a graph break; a replay is eager, as its record was.
            eager = dynamo_callback() is None
            value = self._replay_for(slot) if eager else call_without_dynamo(self._replay_for, slot)
        elif self.session is None:
            slot.value = None
        else:
            self.session.asked(slot)
        if value._version != slot.meta[3]:
            value = self._look_again(slot, value)
        return value

    def _look_again(self, slot: Slot, value: Any) -> Any:
        if type(value) is Doubtful:
            value = settle(self, slot, value)
        if not isinstance(value, Outdated) and value._version != slot.meta[3] and self.options.strict:
            value = other_way(self, slot)
        if isinstance(value, Outdated):
            outdated = value.error(describe(self.fn, self.options))
            failed(self, outdated)
            raise outdated
        if value._version != slot.meta[3]:
            error = mutated(self, value, slot.meta)
            failed(self, error)
            raise error
        return value

    @opaque_to_dynamo
    def unpack_as_torch(self, slot: Slot) -> Any:
        """Torch's rule: within one backward a saved tensor is unpacked once, and each backward has its own values.

        When another backward left the value here (one runs inside the other), the first may have to replay again.
        """
        if slot.value is not None and type(self.backward) is int and graph_task_id() != self.backward:
            self.backward = None
        return self.unpack(slot)

    def _replay_for(self, slot: Slot) -> Any:
        with self.lock if not turns else waiting_for(self.lock):
            value = slot.value  # another device thread may have replayed while this one waited
            while value is None:  # or have taken the value right after this one replayed
                self.replay()
                value = slot.value
            if self.session is None:
                slot.value = None
                if graph_task_id() == -1 and not isinstance(self.backward, sessions.Session):
                    self.clear()  # no backward will use, or end and release, the other values
            else:
                self.session.asked(slot)
        return value

    def replay(self) -> None:
        """Fill every living slot. Called under ``lock``."""
        task = graph_task_id()
        current = sessions.current() if sessions.opened else None
        if current is not None:
            current.admit(self, task)
        elif not self.options.strict:
            sessions.refuse_second_unpack(self, task)
        try:
            replay(self)
        except Exception as error:
            if type(error) is RuntimeError and "vmap" in str(error) and self.options.strict:
                batched = _batched(self, error)
                failed(self, batched)
                raise batched from error
            failed(self, error)
            raise
        self.backward = task if current is None else current
        if self.session is not None:
            self.session.replayed(self)
        elif current is None and task != -1 and len(self.refs) > 1:  # a single value is taken at once
            queue_callback(partial(_end_of_backward, _ref(self)))

    def reach(self) -> int:
        """A replay that stops early reaches no operator that ran after this many saves of the record."""
        living = last_living(self.refs) if self.options.strict else len(self.refs)
        return living if living == len(self.refs) else living + 1

    def living(self) -> list[Slot]:
        """The slots that autograd still holds."""
        return [slot for slot in (ref() for ref in self.refs) if slot is not None]

    def fill(self) -> bool:
        """Replay now if a living slot is empty; whether it did. Without a session a value lasts until its first use.

        Raises:
            CheckpointError: the replay does not match the forward.
        """
        with self.lock if not turns else waiting_for(self.lock):
            empty = any(slot.value is None for slot in self.living())
            if empty:
                self.replay()
        return empty

    def clear(self) -> None:
        """Drop recomputed values that nobody asked for."""
        for ref in self.refs:
            slot = ref()
            if slot is not None:
                slot.value = None


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


def owner(region: Region) -> tuple[torch.nn.Module | None, bool]:
    """The module that a region runs, None for a function; and whether a replay goes through the module's hooks."""
    fn = region.fn
    if isinstance(fn, torch.nn.Module):
        return fn, True
    found = getattr(fn, "__self__", None)
    return (found, False) if isinstance(found, torch.nn.Module) else (None, True)


def describe(fn: Any, options: Options) -> str:
    """A region for people: its given name, or what it runs and where that is defined."""
    from distckpt.engine.inputs import Packed

    while isinstance(fn, (partial, Packed)):
        fn = fn.func if isinstance(fn, partial) else fn.parts[0]
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    kind = getattr(fn, "__qualname__", None) or type(fn).__name__
    if code is None and isinstance(fn, torch.nn.Module):
        code = getattr(type(fn).forward, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"region {options.name or kind}{place}"
