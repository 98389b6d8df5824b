"""Record: run a region's forward."""

from __future__ import annotations

from typing import Any

import torch

from distckpt._torch import call_without_dynamo, dynamo_callback, skip_frame
from distckpt.engine import sessions
from distckpt.engine.options import Options
from distckpt.engine.region import abort_region, close_region, open_region

_grad_enabled = torch.is_grad_enabled


def record(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """``fn(*args, **kwargs)`` as a region; a plain call when grad mode is off.

    Raises:
        DistckptError: see :func:`~distckpt.engine.region.open_region` and ``close_region``.
    """
    if not _grad_enabled():
        return fn(*args, **kwargs)
    if dynamo_callback() is not None:
        # Called from a compiled caller after a graph break: the record and its replays must both run eagerly.
        return call_without_dynamo(_record, fn, args, kwargs, options)
    if sessions.any_open() and (session := sessions.current()) is not None:
        return session.call(_record, fn, args, kwargs, options)
    return _record(fn, args, kwargs, options)


def _record(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    region = open_region(fn, args, kwargs, options)
    try:
        out = fn(*args, **kwargs)
    except BaseException as error:
        abort_region(region, error)
        raise
    close_region(region, out)
    return out


skip_frame(record)
