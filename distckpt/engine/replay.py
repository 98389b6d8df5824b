"""Replay: run a region's function again and put what autograd would have saved into its slots.

Note [Early stop]
    A replay ends at the last slot that still lives, by an exception from the saved-tensor hook. The exception is
    a ``BaseException`` so that a user's ``except Exception`` around an operator does not eat it; if a bare
    ``except`` does, every further save raises it again and a normal return is accepted, since every slot is
    full by then. When the last slots are dead it stops at the first save after the last living one, since only then
    the operator that saved that one has certainly finished. At the very last slot see Note [Unfilled values] in
    ``hooks.py``.
    Where a generator is still on its way it runs on, see Note [Where the forward ended] in ``rng.py``.

Note [What a slot is given]
    An intermediate value as it is. Its recomputed graph stays alive with it, but holds no tensors: what that graph
    saves goes through our hook, which gives it a weak reference to the slot. A leaf is detached: a trainable one
    would be the live parameter, whose storage a sharding engine may have freed by then; a frozen one as well.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from distckpt._torch import (
    SavedTensor,
    call_without_dynamo,
    dynamo_callback,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    script_optimizes,
    set_grad_enabled,
    set_script_optimizes,
    skip_inner_frames,
)
from distckpt.engine import ambient, closure, parameters, rng
from distckpt.engine.determinism import Mismatch
from distckpt.engine.inputs import OWNED, check_marks, give_back, marks
from distckpt.engine.region import Doubtful, Frame, Packed, Region, Slot, here, last_living
from distckpt.engine.stats import counters
from distckpt.engine.streams import Turn
from distckpt.errors import ReplayError

_Parameter = torch.nn.Parameter
cpu_drawn_since = rng.cpu_drawn_since

Call = tuple[Any, list[Any], dict[str, Any], list[torch.Tensor]]
"""A region's call put together again: function, arguments, keywords, and the tensors that its names held."""

Run = Callable[[Region, Call, Any, Mismatch], bool]
"""Recomputes a region in its restored state; true if it stopped early with every generator where it may be left."""


class Stop(BaseException):
    """Every slot is full."""


def _from_slot(saved: Any) -> Any:
    """A value that the recomputed graph saved, for a gradient taken inside a replay."""
    if type(saved) is not weakref.ref:
        return saved
    slot = saved()
    if slot is None or slot.value is None:
        raise ReplayError(
            "a backward through tensors that a replay computed, after the replay has ended",
            why="a replay only serves the graph of its forward; its own graph is gone",
            fix="do not keep tensors that a region computes while dc.is_recomputing()",
        )
    return slot.value


def _until_the_end(rest: Any) -> Any:
    """:func:`_from_slot`, until every slot is full."""

    def unpack(saved: Any) -> Any:
        if rest.__length_hint__() == 0:
            raise Stop
        return _from_slot(saved)

    return unpack


def _recompute(r: Region, call: Call, generators: Any, mismatch: Mismatch) -> bool:
    """Fill the slots of ``r``. Whether it stopped early, with every generator where it may be left."""
    fn, args, kwargs, _ = call
    refs, closed = r.refs, r.closed
    # An unfinished record (a gradient is taken inside it) is never replayed past where it stands: what comes next would
    # happen twice. A value check wants every operator finished.
    # While it is settled its last operator must finish, and nothing after it may run.
    settling = here.settling is r and not closed
    early = not settling and (not closed or (r.early_stop and r.verifier is None))
    wanted = len(refs)
    if early and r.options.strict and refs and refs[-1]() is None:
        wanted = last_living(refs)
    last = refs[-1] if early and refs else None
    beyond_wanted = refs[wanted] if wanted < len(refs) else None
    stopped = early_end = False
    suspects: list[Any] = []
    rest: Any = iter(refs)
    check = r.options.determinism_check != "none"
    at_rest = None if generators is None or not closed else generators.at_rest
    # Torch detaches every value, and its recompute contexts see that.
    detach = r.replay_context is not None and not r.options.strict

    def pack(x: torch.Tensor) -> Any:
        nonlocal stopped, early_end, last, beyond_wanted
        ref = next(rest, None)
        if ref is None:
            return beyond(x)
        if ref is beyond_wanted:
            if at_rest is None or early_end or at_rest():
                early_end = True
                raise Stop
            last = beyond_wanted = None
        slot = ref()
        if slot is None:  # this part of the graph is gone; only the recomputed graph may need the value
            saved = x.detach() if x.requires_grad else x
        else:
            now = (x.shape, x.dtype, x.device, x._version) if check else (None, None, None, x._version)
            if slot.meta != now:
                x = mismatch.compare(refs.index(ref), slot, x, now)
            if x.is_leaf:
                if x.requires_grad or type(x) is _Parameter:
                    x = x.detach()
                else:
                    suspects.append(slot)
            elif detach:
                x = x.detach()
            slot.value = x
            saved = ref
        if ref is last and (at_rest is None or at_rest()):
            stopped = early_end = True
            raise Stop
        return saved

    def beyond(x: torch.Tensor) -> Any:
        if stopped or not closed:
            raise Stop  # somebody swallowed the first one, or an unfinished record is being settled
        mismatch.extra(len(refs))
        raise Stop

    if dynamo_callback() is not None:
        fn = functools.partial(call_without_dynamo, fn)
    here.replaying += 1
    grad = torch.is_grad_enabled()
    set_grad_enabled(True)
    push_saved_tensors_hooks(pack, _until_the_end(rest) if settling else _from_slot)
    out: Any = None
    try:
        out = r.context.copy().run(fn, *args, **kwargs)
    except Stop:
        pass
    except RuntimeError:  # a scripted function turns the stop that passes it into one
        if not early_end:
            raise
    finally:
        pop_saved_tensors_hooks()
        set_grad_enabled(grad)
        here.replaying -= 1
    reached = len(refs) - rest.__length_hint__()
    if reached < wanted:
        mismatch.fewer(reached)
    if suspects:
        if stopped:
            _doubt(suspects, refs[-2:])
        suspects.clear()  # the recomputed graph holds `pack`, and with it this list
    if closed and generators is not None and not early_end and r.options.strict and not mismatch.found:
        mismatch.drew(generators.astray())
    if r.scripted is not None and not early_end and not mismatch.found:
        mismatch.made(out)
    if r.verifier is not None and not stopped:
        r.verifier.compare(refs, r.buffers, mismatch)
    return early_end


def _doubt(suspects: list[Slot], last: list[weakref.ref[Slot]]) -> None:
    """Of the suspects (no parameters, nothing that requires grad) mark those that were among the last saves."""
    for ref in last:
        slot = ref()
        if slot is not None and slot.value is not None and any(slot is s for s in suspects[-2:]):
            slot.value = Doubtful(slot.value)


def replay(r: Region, run: Run = _recompute) -> None:
    """Recompute ``r`` once, under the state it was recorded in (``run`` replaces what is done there).

    Raises:
        CheckpointError: the run did not match the record; the slots are left empty.
        InputChanged: an owned input was changed in place since.
    """
    outer = here.frame
    here.frame = frame = Frame(r, outer)  # already now: a user's unpack hook is no part of what runs around
    pauses_script = r.scripted is not None and script_optimizes()
    if pauses_script:
        set_script_optimizes(False)  # see Note [TorchScript] in determinism.py
    try:
        call = _put_together(r)
        stale = None if r.parameters is None or r.parameters.same() else r.parameters.look()
        counters.replays += 1
        mismatch = Mismatch(r, call)
        now = ambient.snapshot()
        draws = r.draws if r.closed else rng.so_far(r.rng_before, r.stash)
        idle = r.idle_cpu
        rewound = draws or r.idle is not None or (idle is not None and cpu_drawn_since(idle.fingerprint))
        if now == r.ambient and r.buffers is None and stale is None:
            generators: Any = rng.Rewound(draws, idle, r.idle) if rewound else idle
            stopped = False
            try:
                if r.replay_context is None:
                    stopped = run(r, call, generators, mismatch)
                else:
                    with r.replay_context.replaying(r):
                        stopped = run(r, call, generators, mismatch)
            finally:
                if generators is not None and (rewound or not stopped):
                    generators.give_back()
                # a function that sets a state and puts it back at its end has not got there
                if ambient.snapshot() != now:
                    ambient.put_back(now)
        else:
            if stale is not None:
                mismatch.restored = stale.restored
            with contextlib.ExitStack() as stack:
                shared = _shared(r, stale)
                if shared:
                    # with all that it moves at once: two replays must not wait for each other
                    stack.callback(Turn((*shared, *(draw.stream.name for draw in draws or ()))).end)
                generators = rng.Rewound(draws, idle, r.idle) if rewound else idle
                if generators is not None:
                    stack.callback(generators.give_back)
                if stale is not None:
                    stack.enter_context(stale.around(r))
                if r.buffers is not None:
                    stack.enter_context(r.buffers.rewound())
                if now != r.ambient:
                    stack.enter_context(ambient.entered(r.ambient, now))
                else:
                    stack.callback(ambient.put_back, now)
                if r.replay_context is not None:
                    stack.enter_context(r.replay_context.replaying(r))
                run(r, call, generators, mismatch)
        if mismatch.found:
            r.clear()
            mismatch.report(replay)
    except BaseException as raised:
        if frame.refused is None:
            raise
        r.clear()
        raise frame.refused.with_traceback(raised.__traceback__) from None
    finally:
        here.frame = outer
        if pauses_script:
            set_script_optimizes(True)
    if frame.refused is not None:  # a bare `except` of the function's took it for one of its own
        r.clear()
        raise frame.refused


def _put_together(r: Region) -> Call:
    """The call of ``r`` with its inputs unpacked."""
    memo: dict[int, Any] | None = {} if r.repeats else None
    fn, kwargs, captured = r.fn, {}, []
    try:
        args = [a.unpack() if type(a) is SavedTensor and memo is None else a for a in r.args]
    except RuntimeError:
        if r.options.strict:
            give_back(r.args, "args")  # raises it again, naming the argument
        raise
    if r.plain is not None:
        if not closure.same(fn, r.plain):
            r.captured = closure.captured_plainly(fn, r.plain)
    else:
        for i, a in enumerate(args):
            if type(a) in OWNED:
                args[i] = give_back(a, f"args[{i}]", memo)
        if r.kwargs is not None:
            kwargs = give_back(r.kwargs, "kwargs", memo)
        if type(fn) is Packed:
            fn = give_back(fn, "function", memo)
    if r.captured is not None:
        captured, renewed = closure.recall(r.captured, memo)
        if renewed is not None:
            fn, args, kwargs = renewed.call(fn), [renewed.value(a) for a in args], renewed.value(kwargs)
    if r.marks is not None:
        owned = (fn, args, kwargs, captured) if r.options.strict else args
        for then in r.marks:
            check_marks(then, owned)
        # A function may write into what a hook hands out, and the next replay is handed the same.
        r.marks = (r.marks[0], marks(owned))
    if r.tie is not None:
        fn, args, kwargs = r.tie.bind(fn, args, kwargs)
    return fn, args, kwargs, captured


def _shared(r: Region, stale: parameters.Stale | None) -> tuple[str, ...]:
    """What of the whole process, besides generators, the replay exchanges: the names of its turns."""
    shared = () if r.buffers is None else r.buffers.places()
    return (*shared, parameters.MODULES) if stale is not None and stale.back else shared


skip_inner_frames(_recompute)
