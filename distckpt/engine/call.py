"""Call: where every surface (functions, modules, torch's names) hands a call to the engine."""

from __future__ import annotations

from typing import Any

import torch

from distckpt._torch import skip_frame, torch_operator
from distckpt.engine.options import Options
from distckpt.engine.record import record
from distckpt.errors import BadOption

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


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


skip_frame(run)
