"""Exchange: this process's rank, the number of ranks, and one small value from each of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The global rank of this process; 0 without a process group."""
    return dist.get_rank() if _started() else 0


def world() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if _started() else 1


_group: tuple[Any, Any] | None = None  # the default group it was made for, and the control group


def _control_group() -> Any:
    """A group that reaches every rank without the accelerator: the default one where it is gloo, else one beside it."""
    global _group
    default = dist.group.WORLD
    if _group is None or _group[0] is not default:
        gloo = dist.get_backend(default) == "gloo"
        _group = (default, default if gloo else dist.new_group(backend="gloo"))
    return _group[1]


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. A collective: every rank of the job calls it. Picklable values only."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_control_group())
    return found
