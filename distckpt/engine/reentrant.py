"""The reentrant variant: the region is one autograd node whose backward runs a backward of its own.

Kept for torch's surface and for code that relies on it. It records no graph in the forward, so nothing inside can be
differentiated, and only positional tensors take part. The same stash, ambient state and buffers as a region.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import Function

from distckpt._torch import (
    call_without_dynamo,
    dynamo_callback,
    last_script,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    reentrant_backward_allowed,
)
from distckpt.engine.compiler import Tie
from distckpt.engine.determinism import Mismatch
from distckpt.engine.hooks import stays
from distckpt.engine.inputs import tensors
from distckpt.engine.record import abort_region, close_region, open_region
from distckpt.engine.region import Options, Region, here
from distckpt.engine.replay import Call, replay
from distckpt.engine.stats import failed
from distckpt.engine.streams import waiting_for
from distckpt.errors import BadOption, ScannedRegion


def detach_variable(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Detached copies of the tensors in a tuple, with their ``requires_grad``; the rest as it is.

    Raises:
        RuntimeError: ``inputs`` is not a tuple.
    """
    if not isinstance(inputs, tuple):
        raise RuntimeError(
            f"Only tuple of tensors is supported. Got Unsupported input type: {type(inputs).__name__}"
        )

    def fresh(x: torch.Tensor) -> torch.Tensor:
        alone = x.detach()
        alone.requires_grad = x.requires_grad
        return alone

    return tuple(fresh(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def check_backward_validity(inputs: Iterable[Any]) -> None:
    """Warn when no input requires grad: a reentrant region then yields no gradients at all."""
    if not any(x.requires_grad for x in inputs if isinstance(x, torch.Tensor)):
        warnings.warn("None of the inputs have requires_grad=True. Gradients will be None", stacklevel=2)


class CheckpointFunction(Function):
    """The node. ``apply(run_function, preserve_rng_state, *args)``, as torch's."""

    @staticmethod
    def forward(ctx: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        check_backward_validity(args)
        options = preserve_rng_state if isinstance(preserve_rng_state, Options) else None
        if options is None:
            options = Options(preserve_rng_state=bool(preserve_rng_state), strict=False)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.holes = [isinstance(a, torch.Tensor) for a in args]
        ctx.rest = [None if hole else a for a, hole in zip(args, ctx.holes, strict=True)]
        # The region supplies stash, ambient state and buffers; it owns no tensors and records no slots here.
        ctx.region, ctx.tie, out = _forward(run_function, args, options)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not reentrant_backward_allowed():
            raise RuntimeError(
                "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad() or passing an `inputs` "
                "parameter to .backward(). To resolve this error, you can either set use_reentrant=False, or call "
                ".backward() without passing the `inputs` argument."
            )
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if hole else rest for hole, rest in zip(ctx.holes, ctx.rest, strict=True)]
        if ctx.tie is not None:
            ctx.tie.grads.extend(g for g in grads if g is not None)
            _, inputs, _ = ctx.tie.bind(None, inputs, {})
        detached = detach_variable(tuple(inputs))
        outputs = _recompute(ctx.region, detached)
        if ctx.tie is not None:
            ctx.tie.refuse_loop(
                ctx.region.draws, outputs, first=0
            )  # nodes of this thread, back to the inputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g)
            for o, g in zip(outputs, grads, strict=False)
            if isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if not pairs:
            raise RuntimeError("none of output has requires_grad=True, this checkpoint() is not necessary")
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return (None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in detached))


def _forward(fn: Any, args: tuple[Any, ...], options: Options) -> tuple[Region, Tie | None, Any]:
    region = open_region(fn, args, {}, options)
    if region.traced is not None:
        error = ScannedRegion(
            "a reentrant region in a traced graph",
            where=region.traced.where,
            why="its backward runs a backward of its own, which a compiler cannot trace",
            fix="leave use_reentrant at its default, False",
        )
        abort_region(region, error)
        raise error
    region.args = []
    # Nothing saved in here waits for the replay: a gradient taken inside finds its own values.
    pop_saved_tensors_hooks()
    push_saved_tensors_hooks(stays, stays)
    # The node ties its own inputs to the gradients it is given: no hooks on the outputs, nothing for the replay to do.
    tie, region.tie = region.tie, None
    try:
        with torch.no_grad():
            out = fn(*args)
    except BaseException as error:
        abort_region(region, error)
        raise
    close_region(region, out)
    if last_script() is not None:
        region.scripted = 0  # the replay, too, runs functions as they are written
    return region, tie, out


def _recompute(region: Region, inputs: tuple[Any, ...]) -> Any:
    outputs: list[Any] = []

    def run(r: Region, call: Call, generators: Any, mismatch: Mismatch) -> bool:
        here.replaying += 1
        try:
            with torch.enable_grad():
                outputs.append(r.context.copy().run(call[0], *inputs))
        finally:
            here.replaying -= 1
        return False

    with waiting_for(region.lock):
        try:
            replay(region, run)
        except Exception as error:
            failed(region, error)
            raise
    return outputs[0]


def reentrant(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """``fn(*args)`` as a reentrant region.

    Raises:
        BadOption: keyword arguments, or tensors inside containers, which its node cannot take.
    """
    if kwargs:
        raise BadOption(
            f"a reentrant region takes positional arguments only, not {', '.join(kwargs)}",
            fix="leave use_reentrant at its default, False",
        )
    hidden = [fn, *(a for a in args if not isinstance(a, torch.Tensor))]
    if any(True for _ in tensors(hidden)):
        raise BadOption(
            "a reentrant region takes tensors as arguments of their own, not in containers or partials",
            why="its node gives gradients to, and checks, only those",
            fix="leave use_reentrant at its default, False",
        )
    if dynamo_callback() is not None:
        return call_without_dynamo(CheckpointFunction.apply, fn, options, *args)
    return CheckpointFunction.apply(fn, options, *args)
