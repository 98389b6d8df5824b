"""Private ``torch.distributed`` APIs: one name each, as in ``_torch.py``. Supported: torch 2.9 to 2.15."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def default_store() -> Any:
    """The store that the default process group met through, or None when there is no such group.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def abort_groups() -> None:
    """Ask every process group to give up its collectives in flight.

    NCCL does (its communicators are aborted and kernels end); gloo accepts the call and goes on waiting.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        try:
            group.abort()
        except (RuntimeError, AttributeError):  # a backend without it
            continue


def group_of_collective(args: Sequence[Any]) -> Any:
    """The process group in the arguments of a ``c10d`` or ``_c10d_functional`` operator, or None.

    The first hand over the group itself, boxed, the second its registered name, as the last string.
    """
    from torch._C._distributed_c10d import _resolve_process_group

    for arg in args:
        if isinstance(arg, torch_script_object()):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:  # another boxed object: a reduce operation, a work handle
                continue
    names: list[Any] = [arg for arg in args if isinstance(arg, str)]
    if not names:
        return None
    try:
        return _resolve_process_group(names[-1])
    except (RuntimeError, ValueError):
        return None


def torch_script_object() -> type:
    """The type that boxed C++ objects arrive as in a dispatch mode."""
    import torch

    return torch.ScriptObject
