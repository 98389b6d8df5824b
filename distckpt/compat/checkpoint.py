"""``torch.utils.checkpoint``'s functions over our engine, as of torch 2.15.

Torch's defaults, warnings and error types; regions are not strict (see :class:`~distckpt.engine.region.Options`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from distckpt_backends import get

from distckpt._torch import (
    call_without_dynamo,
    dynamo_callback,
    is_aot_tracing,
    noop_context_fn,
    original_checkpoint,
    skip_frame,
    torch_operator,
    user_determinism_checks,
)
from distckpt.engine.api import chunk, run_chunk
from distckpt.engine.inputs import tensors
from distckpt.engine.record import abort_region, close_region, open_region, record
from distckpt.engine.reentrant import CheckpointFunction
from distckpt.engine.region import CHECKS, Options, debug_switch
from distckpt.engine.rng import DefaultDeviceType, choose, current_rule, device_types

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _unspecified(function: str) -> None:
    warnings.warn(
        f"torch.utils.checkpoint{function}: the use_reentrant parameter should be passed explicitly. In a future "
        "release, leaving it out will raise an exception. use_reentrant=False is recommended; use_reentrant=True keeps "
        "today's default.",
        stacklevel=4,
    )


def _unexpected(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))


class _CheckpointedFunction:
    """A function whose every call is a region; binds like a method."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = function
        self.checkpoint_kwargs = options
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _checkpoint(self.function, args, kwargs, **self.checkpoint_kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        bind = getattr(self.function, "__get__", None)
        if instance is None or bind is None:
            return self
        return type(self)(bind(instance, owner), **self.checkpoint_kwargs)


def checkpoint(
    function: object = None,
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    context_fn: object = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Torch's ``checkpoint``: same arguments, defaults and errors. See :func:`distckpt.checkpoint` for ours.

    Without ``function`` it returns a decorator. ``use_reentrant`` left out means True, with a warning.

    Raises:
        ValueError: keyword arguments or options that the chosen variant does not take.
        CheckpointError: in backward, when the recomputation does not match the forward.
    """
    options = {
        "use_reentrant": use_reentrant,
        "preserve_rng_state": preserve_rng_state,
        "context_fn": context_fn,
        "determinism_check": determinism_check,
        "debug": debug,
        "early_stop": early_stop,
        "respect_saved_tensors_hooks": respect_saved_tensors_hooks,
    }
    if function is None and not args:
        _unexpected(kwargs)
        return functools.partial(_CheckpointedFunction, **options)
    return _checkpoint(function, args, kwargs, **options)


def _checkpoint(
    function: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    use_reentrant: bool | None,
    preserve_rng_state: bool,
    context_fn: Any,
    determinism_check: str,
    debug: bool,
    early_stop: bool,
    respect_saved_tensors_hooks: bool | None,
) -> Any:
    if use_reentrant is None:
        _unspecified("")
        use_reentrant = True
    if _is_dynamo_compiling():
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
        if context_fn is not noop_context_fn:
            options["context_fn"] = context_fn
        return torch_operator(function, args, kwargs, options)
    if context_fn is not noop_context_fn and is_aot_tracing():
        # Torch's operator, on its way through AOTAutograd, found our function under its name (compat.install).
        return original_checkpoint(
            function,
            *args,
            use_reentrant=use_reentrant,
            preserve_rng_state=preserve_rng_state,
            context_fn=context_fn,
            early_stop=early_stop,
            **kwargs,
        )
    if use_reentrant:
        _unexpected(kwargs)
        if context_fn is not noop_context_fn or debug is not False or respect_saved_tensors_hooks is not None:
            raise ValueError(
                "Passing `context_fn`, `debug`, or `respect_saved_tensors_hooks` is only supported when "
                "use_reentrant=False."
            )
        if dynamo_callback() is not None:
            return call_without_dynamo(CheckpointFunction.apply, function, preserve_rng_state, *args)
        return CheckpointFunction.apply(function, preserve_rng_state, *args)
    options = region_options(
        preserve_rng_state, context_fn, determinism_check, debug, early_stop, respect_saved_tensors_hooks
    )
    return record(function, args, kwargs, options)


def region_options(
    preserve_rng_state: bool,
    context_fn: object,
    determinism_check: str,
    debug: bool,
    early_stop: bool,
    respect_saved_tensors_hooks: bool | None = None,
) -> Options:
    """Options of a region that behaves as torch's.

    Raises:
        ValueError: an unknown determinism check, or debug together with a context function.
    """
    override = debug_switch.get()
    if (debug if override is None else override) and context_fn is not noop_context_fn:
        raise ValueError("debug=True is incompatible with non-default context_fn")
    check: Any = determinism_check
    if check not in CHECKS:
        check = user_determinism_checks.get(check)
        if check is None:
            known = [*CHECKS, *(k for k in user_determinism_checks if k not in CHECKS)]
            raise ValueError(f"determinism_check should be one of {known}, but got {determinism_check}")
    return _options(
        bool(preserve_rng_state),
        None if context_fn is noop_context_fn else context_fn,
        check,
        bool(debug),
        bool(early_stop),
        respect_saved_tensors_hooks,
    )


def _options(
    preserve: bool, context_fn: Any, check: Any, debug: bool, early: bool, respect: bool | None
) -> Options:
    if context_fn is None:
        return _plain_options(preserve, check, debug, early, respect)
    return Options(preserve, context_fn, check, debug, early, respect, strict=False)


@functools.lru_cache(maxsize=64)
def _plain_options(preserve: bool, check: Any, debug: bool, early: bool, respect: bool | None) -> Options:
    return Options(preserve, None, check, debug, early, respect, strict=False)


def _checkpoint_without_reentrant_generator(
    fn: object,
    preserve_rng_state: bool = True,
    context_fn: object = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    *args: Any,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Iterator[None]:
    """A region opened at the first ``next`` and closed at the second, for callers that run ``fn`` themselves."""
    return _checkpoint_without_reentrant_generator_impl(
        fn,
        args,
        kwargs,
        preserve_rng_state=preserve_rng_state,
        context_fn=context_fn,
        determinism_check=determinism_check,
        debug=debug,
        early_stop=early_stop,
        respect_saved_tensors_hooks=respect_saved_tensors_hooks,
    )


def _checkpoint_without_reentrant_generator_impl(
    fn: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    preserve_rng_state: bool = True,
    context_fn: object = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
) -> Iterator[None]:
    options = region_options(
        preserve_rng_state, context_fn, determinism_check, debug, early_stop, respect_saved_tensors_hooks
    )
    if not torch.is_grad_enabled():
        yield
        return
    region = open_region(fn, args, kwargs, options)
    try:
        yield
    except BaseException as error:
        abort_region(region, error)
        raise
    close_region(region, None)


def checkpoint_sequential(
    functions: object, segments: int, input: object, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    """Torch's ``checkpoint_sequential``: ``segments`` equal parts, all but the last checkpointed.

    Raises:
        ValueError: a keyword other than ``preserve_rng_state``.
    """
    if use_reentrant is None:
        _unspecified(".checkpoint_sequential")
        use_reentrant = True
    preserve = kwargs.pop("preserve_rng_state", True)
    _unexpected(kwargs)
    *checkpointed, last = chunk(functions, segments)
    for part in checkpointed:
        run = functools.partial(run_chunk, part)
        input = checkpoint(run, input, use_reentrant=use_reentrant, preserve_rng_state=preserve)
    return run_chunk(last, input)


def _infer_device_type(*args: Any) -> str:
    """The one device type besides the CPU that the tensors in ``args`` are on, or the default type."""
    chosen = choose(device_types(tensors(args)), current_rule("warn"), "the arguments of a checkpointed call")
    return chosen[0] if chosen else DefaultDeviceType.get_device_type()


def get_device_states(*args: Any) -> tuple[list[int], list[Any]]:
    """Indices of the devices that the tensors in ``args`` are on, and the random state of each, once per device."""
    kind = _infer_device_type(*args)
    indices = list(
        dict.fromkeys(t.get_device() for t in tensors(args) if t.device.type not in ("cpu", "meta"))
    )
    if not indices:
        return [], []
    backend = get(kind)
    return indices, [backend.rng_stash(torch.device(kind, i)) for i in indices]


def set_device_states(
    devices: Sequence[int], states: Sequence[Any], *, device_type: str | None = None
) -> None:
    """Put back what :func:`get_device_states` read; ``device_type`` defaults to ``DefaultDeviceType``'s."""
    kind = DefaultDeviceType.get_device_type() if device_type is None else device_type
    if kind == "meta" or not devices:
        return
    backend = get(kind)
    for index, state in zip(devices, states, strict=False):
        backend.rng_restore(torch.device(kind, index), state)


skip_frame(checkpoint)
skip_frame(_checkpoint)
skip_frame(_CheckpointedFunction.__call__)
