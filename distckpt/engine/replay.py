"""Replay: run a region's function again and put what autograd would have saved into its slots.

Note [Early stop]
    A replay ends at the last slot that still lives, by an exception from the saved-tensor hook. The exception is
    a ``BaseException`` so that a user's ``except Exception`` around an operator does not eat it; if a bare
    ``except`` does, every further save raises it again and a normal return is accepted, since every slot is
    full by then. When the last slots are dead it stops at the first save after the last living one, since only then
    the operator that saved that one has certainly finished. At the very last slot see Note [Doubt] in ``doubt.py``.
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
from typing import TYPE_CHECKING, Any

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
)
from distckpt.engine import ambient, closure, inputs, parameters, rng
from distckpt.engine.doubt import doubt
from distckpt.engine.events import counters
from distckpt.engine.inputs import Packed, check_marks, give_back, marks
from distckpt.engine.mismatch import Mismatch
from distckpt.engine.state import Frame, here
from distckpt.engine.turns import Turn
from distckpt.errors import ReplayError

if TYPE_CHECKING:
    from distckpt.engine.region import Region

_Parameter = torch.nn.Parameter
cpu_drawn_since = rng.cpu_drawn_since


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


def stays(saved: Any) -> Any:
    """Both hooks of a region whose saved tensors stay where they are: a traced or a reentrant one."""
    return saved


def is_engine_hook(pair: tuple[Any, Any]) -> bool:
    """Whether a saved-tensor hook pair is the engine's own, from a record or a replay of any kind."""
    return str(getattr(pair[1], "__module__", "")).startswith("distckpt.engine.")


def last_living(refs: list[Any]) -> int:
    """How many saves there were up to the last one whose slot still lives."""
    n = len(refs)
    while n and refs[n - 1]() is None:
        n -= 1
    return n


def replay(r: Region, run: Any = None) -> None:
    """Recompute ``r`` once, under the state it was recorded in (``run`` replaces what is done there).

    Raises:
        CheckpointError: the run did not match the record; the slots are left empty.
        InputChanged: an owned input was changed in place since.
    """
    outer = here.frame
    here.frame = frame = Frame(r, outer)  # already now: a user's unpack hook is no part of what runs around
    pauses_script = r.scripted is not None and script_optimizes()
    if pauses_script:
        set_script_optimizes(False)  # see Note [TorchScript] in scripted.py
    try:
        _replay(r, run or _run)
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


def _replay(r: Region, run: Any) -> None:
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
            if type(a) in inputs.OWNED:
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
    stale = None if r.parameters is None or r.parameters.same() else r.parameters.look()
    counters.replays += 1
    if r.tie is not None:
        fn, args, kwargs = r.tie.bind(fn, args, kwargs)
    mismatch = Mismatch(r, (fn, args, kwargs, captured))
    if stale is not None:
        mismatch.restored = stale.restored
    now = ambient.snapshot()
    draws = r.draws if r.closed else rng.so_far(r.rng_before, r.stash)
    generators: Any = r.idle_cpu
    rewound = (
        draws or r.idle is not None or (generators is not None and cpu_drawn_since(generators.fingerprint))
    )
    if now == r.ambient and r.replay_context is None and r.buffers is None and stale is None:
        stopped: Any = False
        if rewound:
            generators = rng.Rewound(draws, generators, r.idle)
        try:
            stopped = run(r, fn, args, kwargs, generators, mismatch)
        finally:
            if generators is not None and (rewound or not stopped):
                generators.give_back()
            # a function that sets a state and puts it back at its end has not got there
            if ambient.snapshot() != now:
                ambient.put_back(now)
    else:
        with contextlib.ExitStack() as stack:
            shared = () if r.buffers is None else r.buffers.places()
            if stale is not None and stale.back:
                shared = (*shared, parameters.MODULES)
            if shared:
                # with all that it moves at once: two replays must not wait for each other
                stack.callback(Turn((*shared, *(draw.stream.name for draw in draws or ()))).end)
            if rewound:
                generators = rng.Rewound(draws, generators, r.idle)
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
            run(r, fn, args, kwargs, generators, mismatch)
    if mismatch.found:
        r.clear()
        mismatch.report()


def _run(
    r: Region,
    fn: Any,
    args: list[Any],
    kwargs: dict[str, Any],
    generators: Any,
    mismatch: Mismatch,
) -> bool:
    """Fill the slots of ``r``. Whether it stopped early, with every generator where it may be left."""
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
            doubt(suspects, refs[-2:])
        suspects.clear()  # the recomputed graph holds `pack`, and with it this list
    if closed and generators is not None and not early_end and r.options.strict and not mismatch.found:
        mismatch.drew(generators.astray())
    if r.scripted is not None and not early_end and not mismatch.found:
        mismatch.made(out)
    if r.verifier is not None and not stopped:
        r.verifier.compare(refs, r.buffers, mismatch)
    return early_end
