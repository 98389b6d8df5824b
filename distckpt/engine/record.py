"""Record: run a region's forward, and take what its replay will need."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextvars import copy_context
from types import FunctionType, MethodType
from typing import Any

import torch
from distckpt_backends import live

from distckpt._torch import (
    call_without_dynamo,
    dynamo_callback,
    last_script,
    make_saved_tensor,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    script_optimizes,
    set_script_optimizes,
    skip_frame,
    top_saved_tensors_hooks,
    torch_operator,
    traced_graph,
)
from distckpt.engine import ambient, buffers, closure, diagnose, inputs, parameters, rng, streams
from distckpt.engine.ambient import Contexts
from distckpt.engine.compiler import Tie, Traced
from distckpt.engine.determinism import optimised_graphs
from distckpt.engine.hooks import is_engine_hook, packer, stays, unpack, unpack_as_torch
from distckpt.engine.inputs import Scan, own_call, tensors
from distckpt.engine.region import (
    Options,
    Region,
    current_session,
    debug_switch,
    describe,
    early_stop_switch,
    here,
    open_sessions,
)
from distckpt.engine.rng import choose, current_rule, device_types, stashed_backends
from distckpt.engine.stats import counters
from distckpt.errors import BadOption, LateDevice, SuppressedException, UnstashedDraw

_Tensor = torch.Tensor
_PLAIN = inputs.ATOMS | {_Tensor}
_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_RLock: Any = type(threading.RLock())  # the C class; the name in `threading` is a Python function around it
_observer: Callable[[Region, Any], None] | None = None
_early_stop = early_stop_switch.get
_debug = debug_switch.get


def run(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """``fn(*args, **kwargs)`` as a non-reentrant region; torch's operator while Dynamo traces.

    Raises:
        DistckptError: see :mod:`distckpt.engine.record`.
    """
    if _is_dynamo_compiling():
        return torch_operator(fn, args, kwargs, for_torch(options))
    return record(fn, args, kwargs, options)


def for_torch(options: Options) -> dict[str, Any]:
    """The options that torch's operator understands; the others have no meaning in a compiled graph."""
    if options.partition is not None:
        raise BadOption(
            "a region with partition= cannot be traced into a compiled graph",
            why="torch's operator keeps every input whole",
            fix="call the region outside torch.compile, or leave partition out",
        )
    known: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": options.preserve_rng_state}
    if options.context_fn is not None:
        known["context_fn"] = options.context_fn
    return known


def record(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """``fn(*args, **kwargs)`` as a region; a plain call when grad mode is off.

    Raises:
        DistckptError: see :func:`open_region` and :func:`close_region`.
    """
    if not _grad_enabled():
        return fn(*args, **kwargs)
    if dynamo_callback() is not None:
        # Called from a compiled caller after a graph break: the record and its replays must both run eagerly.
        return call_without_dynamo(_record, fn, args, kwargs, options)
    if open_sessions and (session := current_session()) is not None:
        return session.call(_record, fn, args, kwargs, options)
    return _record(fn, args, kwargs, options)


def _record(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    region = open_region(fn, args, kwargs, options)
    try:
        out = fn(*args, **kwargs)
    except BaseException as error:
        abort_region(region, error)
        raise
    close_region(region, out, (fn, args, kwargs))
    return out


def open_region(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Region:
    """Begin the record of ``fn(*args, **kwargs)`` on this thread: from here on its saved tensors become slots.

    The caller runs the function and then calls :func:`close_region`, or :func:`abort_region` if it raised.
    Grad mode must be on.

    Raises:
        MixedDeviceTypes: inputs on two device types under the rule ``"error"``.
        ScannedRegion, UnitInsideRegion: an option, or a module, that cannot be replayed there.
    """
    r = Region()
    r.options = options
    early = _early_stop()
    r.early_stop = options.early_stop if early is None else early
    strict = options.strict
    hooks = top_saved_tensors_hooks()
    generators: list[torch.Generator] | None = None
    if strict:
        generators = (
            None if hooks is None and _own_plainly(r, fn, args, kwargs) else _own(r, fn, args, kwargs, hooks)
        )
    else:
        r.fn = fn
        if hooks is not None and not is_engine_hook(hooks):
            r.marks = (inputs.marks(args),)
        r.args = [inputs.own_tensor(a) if isinstance(a, _Tensor) else a for a in args]
        if kwargs:
            r.kwargs = kwargs
    r.lock = _RLock()
    r.context = copy_context()
    r.ambient = ambient.snapshot()
    if open_sessions and (session := current_session()) is not None:
        session.enroll(r)
    backends = live()
    if backends:
        _stash_devices(r, fn, args, kwargs, backends, generators)
    elif (generators is not None or streams.registered()) and options.preserve_rng_state:
        r.stash = rng.Stash((), (), generators)
    if options.preserve_rng_state:
        r.rng_before = rng.cpu_before()
    r.refs = []
    counters.regions += 1
    if _observer is not None:
        _observer(r, (fn, args, kwargs))
    r.outer = here.frame
    if options.context_fn is not None or options.debug or _debug() is not None:
        _enter_forward_context(r)
    try:
        if r.traced is None:
            push_saved_tensors_hooks(packer(r), MethodType(unpack if strict else unpack_as_torch, r))
        else:
            push_saved_tensors_hooks(stays, stays)
    except BaseException:  # under torch.func there are no hooks
        if r.replay_context is not None:
            _leave_forward_context(r, None)
        raise
    here.frame = r
    r.pauses_script = script_optimizes()
    if r.pauses_script:
        set_script_optimizes(False)  # see Note [TorchScript] in determinism.py
    return r


def _own_plainly(r: Region, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Own the inputs of a plain function of tensors, which most regions are; False when it is another call."""
    if type(fn) is not FunctionType or kwargs or r.options.partition is not None:
        return False
    if not _PLAIN.issuperset(map(type, args)):
        return False
    plain = closure.capture_plainly(fn)
    if plain is None:
        return False
    try:
        r.args = [make_saved_tensor(a, False) if type(a) is _Tensor else a for a in args]
    except RuntimeError:  # an inference tensor
        return False
    r.fn = fn
    r.plain = plain
    return True


def _own(
    r: Region, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: Any
) -> list[torch.Generator] | None:
    """Own the inputs of any call, and look at the modules that it reaches; the generators that it holds."""
    scan = Scan()
    if hooks is not None:
        scan.hooked = True
        scan.inside = is_engine_hook(hooks)
    if r.options.partition is None:
        r.fn, r.args, r.kwargs = own_call(fn, args, kwargs, scan)
    else:
        r.fn, r.args, r.kwargs = r.options.partition.own(fn, args, kwargs)
        scan.look(fn, args, kwargs)
    r.captured = closure.capture(fn, scan)
    if hooks is not None and not scan.inside:
        r.marks = (inputs.marks((fn, args, kwargs, scan.captured)),)
    r.repeats = scan.repeats
    reached = buffers.holders(fn if scan.modules or type(fn) is not FunctionType else None, args, kwargs)
    if reached is not None and reached.owners:
        r.buffers = buffers.watch(reached.owners)
    if reached is not None or scan.parameters is not None:
        r.reached = reached, scan.parameters
    if scan.normalises:
        held = closure.held_tensors(r.captured) if r.captured is not None else []
        r.buffers = buffers.with_statistics(r.buffers, tensors((fn, args, kwargs, held)))
    return scan.generators


def observe(seen: Callable[[Region, Any], None] | None) -> None:
    """Call ``seen(region, its call)`` whenever a region is opened, on the thread that opens it; None ends that."""
    global _observer
    _observer = seen


def _stash_devices(
    r: Region,
    fn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backends: tuple[Any, ...],
    generators: list[torch.Generator] | None,
) -> None:
    strict = r.options.strict
    met = tensors((fn, args, kwargs) if strict else args)
    name = current_rule("error" if strict else "warn")
    types = choose(device_types(met), name, describe(fn, r.options))
    chosen = backends if name == "all" else stashed_backends(types, backends)
    if r.options.preserve_rng_state:
        r.stash = rng.Stash(chosen, tuple(b for b in backends if b not in chosen), generators)
    for backend in chosen:
        if backend.capabilities.deferred:
            where, graph = describe(fn, r.options), traced_graph()
            if graph is None:
                r.tie = Tie(backend, buffers.reached_modules(fn, args, kwargs) or (), where)
            else:
                r.traced = Traced(graph, r.options, where)
                r.session = r.buffers = None


def close_region(r: Region, out: Any, call: tuple[Any, ...] | None = None) -> None:
    """Finish a record whose function returned ``out``; ``call`` if ``out`` is what that returned, and has a graph.

    Raises:
        UnstashedDraw: random numbers were drawn on a device that the region does not stash.
        LateDevice: a device type came up inside the region.
        BufferChanged: a large buffer changed for the first time.
        LazyFunction: it returned a generator or a coroutine, which has not run yet.
        ScannedRegion, ScannedDropout: in a traced graph, a value was pinned or the fused dropout used.
    """
    pop_saved_tensors_hooks()
    here.frame = r.outer
    r.outer = None
    r.closed = True
    if r.pauses_script:
        set_script_optimizes(True)
    if r.log is not None or r.replay_context is not None:
        _leave_forward_context(r, None)
    before = r.rng_before
    if before is not None:
        draw = rng.cpu_draw(before)
        if draw is not None:
            r.draws = [draw]
        else:
            r.idle_cpu = before
        r.rng_before = None
        if r.stash is not None:
            _close_stash(r, r.stash)
        elif live():
            _late(r, rng.newly_live(()))
    if r.reached is not None:
        r.parameters = parameters.hold(*r.reached)
        r.reached = None
    if r.buffers is not None:
        r.buffers = r.buffers.changes(describe(r.fn, r.options))
    if r.verifier is not None:
        r.verifier.seal(r.buffers)
    if not r.refs and type(out) in diagnose.LAZY and r.options.strict:
        raise diagnose.lazy(describe(r.fn, r.options), out)
    if r.tie is not None:
        r.tie.refuse_loop(r.draws, out)
        r.tie.attach(out)
    elif r.traced is not None:
        r.traced.seal(r.pins)
    if call is not None and last_script() is not None:
        _count_scripted(r, out, call)


def abort_region(r: Region, error: BaseException) -> None:
    """Finish a record whose function raised ``error``; the caller raises it again."""
    pop_saved_tensors_hooks()
    here.frame = r.outer
    r.outer = None
    if r.pauses_script:
        set_script_optimizes(True)
    if r.log is not None or r.replay_context is not None:
        _leave_forward_context(r, error)


def _count_scripted(r: Region, out: Any, call: tuple[Any, ...]) -> None:
    # What the call holds, not what the region owns of it: to unpack that would run hooks and an outer region's replay.
    captured = closure.held_tensors(r.captured) if r.captured is not None else []
    r.scripted = optimised_graphs(out, tensors((*call, captured)))
    r.early_stop = False


def _close_stash(r: Region, stash: rng.Stash) -> None:
    draws, idle, foreign = stash.moved()
    r.stash = None
    if draws:
        r.draws = [*(r.draws or ()), *draws]
    if idle:
        r.idle = [*(r.idle or ()), *idle]
    if foreign:
        _unstashed(r, foreign)
    late = rng.newly_live(stash.types)
    if late:
        _late(r, late)


def _unstashed(r: Region, devices: list[str]) -> None:
    error = UnstashedDraw(
        f"the region drew random numbers on {', '.join(devices)}, which it does not stash",
        where=describe(r.fn, r.options),
        why="its inputs live on another device type, so the replay would draw other numbers",
        fix='pass a tensor of that device to the region, or choose dc.devices.rule("all")',
    )
    if r.options.strict and current_rule("error") != "warn":
        raise error
    warnings.warn(str(error), stacklevel=5)


def _late(r: Region, types: list[str]) -> None:
    if not types:
        return
    if not r.options.strict:
        raise RuntimeError(
            "PyTorch's device state was initialized in the forward pass of a Checkpoint, which is not allowed. "
            f"Use {types[0]} once before the region, so that its random state can be stashed."
        )
    raise LateDevice(
        f"device type {types[0]!r} was initialised for the first time inside a region",
        where=describe(r.fn, r.options),
        why="its random state before the region is unknown, so a replay could draw other numbers",
        fix="use the device once before the region, for example torch.zeros(1, device=...)",
    )


def _enter_forward_context(r: Region) -> None:
    debug = _debug()
    debug = r.options.debug if debug is None else debug
    make = r.options.context_fn
    if debug:
        if make is not None and not r.options.strict:
            raise ValueError("debug=True is incompatible with non-default context_fn")
        r.log = diagnose.Log()
    if make is None and not debug:
        return
    r.replay_context = Contexts(make, r)
    r.replay_context.enter_forward(r)


def _leave_forward_context(r: Region, error: BaseException | None) -> None:
    if r.replay_context.leave_forward(error) and error is not None:
        message = (
            "torch.utils.checkpoint: the forward context provided by context_fn suppressed an exception raised "
            "during the checkpointed forward. This is not supported because there is no value to return."
        )
        raise (SuppressedException(message) if r.options.strict else RuntimeError(message)) from error


skip_frame(run)
skip_frame(record)
