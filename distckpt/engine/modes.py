"""Dispatch modes: whether one is on is state that autograd reads.

Note [Gradients that add up]
    Autograd adds up gradients in place, but not while a dispatch mode is on (a selective region around, a counter of
    the user's). So the result of a gradient taken inside a region is the same to the bit, but at another version (see
    Note [Versions] in ``mismatch.py``), when a mode was on in the record and is not in the replay, or the other way
    round. Nobody asks for modes before a version differs; then the region is replayed once more the other way, and
    only what differs then too was changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from distckpt._torch import dispatch_mode_is_on, without_dispatch_modes
from distckpt.engine.doubt import Doubtful, settle
from distckpt.engine.turns import waiting_for

if TYPE_CHECKING:
    from distckpt.engine.region import Region
    from distckpt.engine.slot import Slot


class _Idle(TorchDispatchMode):
    """A mode that changes nothing by itself."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def other_way(region: Region, slot: Slot) -> Any:
    """The value of ``slot`` from a replay under a dispatch mode if none is on, and under none if one is."""
    from distckpt.engine.replay import replay

    with waiting_for(region.lock), without_dispatch_modes() if dispatch_mode_is_on() else _Idle():
        value = None
        while value is None:  # another thread may take it first
            replay(region)
            value = slot.value
        if type(value) is Doubtful:
            value = settle(region, slot, value)
    if region.session is None:
        slot.value = None
    return value
