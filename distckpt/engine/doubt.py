"""Doubt: values that an early-stopped replay took from an operator before that operator had run.

Note [Doubt]
    Most operators hand their inputs to the saved-tensor hook before their kernel runs, and those are ready.
    RReLU also hands over a noise tensor that its kernel has yet to fill (pytorch#193671), and neither its version
    nor the random state tells. So when a replay stops at the very last slot, what does not require grad among
    the last two saves is only given out after a look at who asks: for RReLU the region is replayed again, to its
    end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt._torch import current_node
from distckpt.engine.state import here
from distckpt.engine.turns import waiting_for

if TYPE_CHECKING:
    from distckpt.engine.region import Region
    from distckpt.engine.slot import Slot


class Doubtful:
    """A value whose operator may not have filled it. Its version equals no tensor's, so that no check lets it pass."""

    __slots__ = ("value",)
    _version = -1

    def __init__(self, value: Any) -> None:
        self.value = value


def doubt(suspects: list[Slot], last: list[Any]) -> None:
    """Of the suspects (no parameters, nothing that requires grad) mark those that were among the last saves."""
    for ref in last:
        slot = ref()
        if slot is not None and slot.value is not None and any(slot is s for s in suspects[-2:]):
            slot.value = Doubtful(slot.value)


def settle(region: Region, slot: Slot, doubtful: Doubtful) -> Any:
    """The tensor behind a doubtful value, from a complete replay if its operator needs one."""
    node = current_node()
    if node is not None and not node.name().startswith("RreluWithNoise"):
        return doubtful.value
    from distckpt.engine.replay import replay

    with waiting_for(region.lock):
        region.early_stop = False
        settling, here.settling = here.settling, region
        try:
            value = None
            while value is None:  # another thread may take it first
                replay(region)
                value = slot.value
        finally:
            here.settling = settling
        if region.session is None:
            slot.value = None
    return value
