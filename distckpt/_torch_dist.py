"""The room for private names of ``torch.distributed``: one function each, with what it is for.

Supported: torch 2.9 to 2.15; the same rules as in ``_torch.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def all_gather(out: Any, part: Any, group: Any, async_op: bool = False) -> Any:
    """Gather one tensor of each rank of ``group`` into one; the work to wait for when ``async_op``."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(out, part, group=group, async_op=async_op)


def group_device_types(group: Any) -> tuple[str, ...]:
    """The device types whose tensors can travel through ``group``."""
    return tuple(device.type for device in group._device_types)


def plain_part(
    t: torch.Tensor, ranks: list[int]
) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]] | None:
    """The plain tensor that is all of ``t`` on each of ``ranks``, and what makes a detached ``t`` of it again.

    Of a DTensor that is replicated over a mesh dim with these ranks, and of a collective's result that may not have
    arrived yet (it is waited for, and comes back as a plain tensor). None for any other subclass.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    part, again, grad = t, _itself, t.requires_grad
    if isinstance(part, DTensor):
        mesh, placements = part.device_mesh, part.placements
        groups = [dist.get_process_group_ranks(mesh.get_group(i)) for i in range(mesh.ndim)]
        if not any(p.is_replicate() and g == ranks for p, g in zip(placements, groups, strict=True)):
            return None
        again = partial(
            DTensor.from_local,
            device_mesh=mesh,
            placements=placements,
            run_check=False,
            shape=part.shape,
            stride=part.stride(),
        )
        part = part._local_tensor
    if isinstance(part, AsyncCollectiveTensor):
        part = part.trigger_wait()

    def make(found: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = again(found)
        return made.requires_grad_() if grad else made

    return (part, make) if type(part) is torch.Tensor else None


def _itself(t: torch.Tensor) -> torch.Tensor:
    return t


def dtensor_tracker() -> Any:
    """DTensor's random state tracker, or None: it has none on a CPU mesh, nor before its first random operator."""
    try:
        from torch.distributed.tensor import _random
    except ImportError:  # a torch without distributed
        return None
    return _random._rng_tracker


def make_dtensor_tracker(mesh: Any) -> Any:
    """DTensor's tracker, made now where the device type of ``mesh`` can have one. None where it cannot.

    DTensor makes it in its first random operator otherwise, and that broadcasts rank 0's random state to all.
    """
    from torch.distributed.tensor import _random

    if _random._rng_tracker is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that a CPU mesh has no tracker
            if not _random.is_rng_supported_mesh(mesh):
                return None
        _random._rng_tracker = _random.OffsetBasedRNGTracker(mesh, run_state_sync=False)
    return _random._rng_tracker


def tracker_state(tracker: Any) -> Any:
    """What a tracker keeps beside the device generator: whether it is on, and the states that some versions hold."""
    if tracker is None:
        return None
    held = getattr(tracker, "rng_states", None) or {}
    return tracker.distribute_region_enabled, {tag: state.clone() for tag, state in held.items()}


def set_tracker_state(tracker: Any, state: Any) -> None:
    """Undo what happened since :func:`tracker_state`."""
    if tracker is None or state is None:
        return
    tracker.distribute_region_enabled, held = state
    if held:
        tracker.rng_states = {tag: kept.clone() for tag, kept in held.items()}
