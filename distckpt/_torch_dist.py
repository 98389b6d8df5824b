"""The room for private names of ``torch.distributed``: one function each, with what it is for.

Supported: torch 2.9 to 2.15; the same rules as in ``_torch.py``.
"""

from __future__ import annotations

import warnings
from typing import Any


def all_gather(out: Any, part: Any, group: Any, async_op: bool = False) -> Any:
    """Gather one tensor of each rank of ``group`` into one; the work to wait for when ``async_op``."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(out, part, group=group, async_op=async_op)


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
