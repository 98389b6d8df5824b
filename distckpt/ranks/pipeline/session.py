"""MicroBatch: the session of one micro-batch on one stage, from its forward to the last backward that uses it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from distckpt._torch import current_node
from distckpt.engine.inputs import tensors
from distckpt.engine.region import Region, Slot, describe, here, region_here
from distckpt.engine.sessions import Session
from distckpt.engine.stats import held, held_storages, input_keys, value_storages
from distckpt.ranks.pipeline.halves import Again

if TYPE_CHECKING:
    from distckpt.ranks.pipeline.stage import Stage


class MicroBatch(Session):
    """Regions recorded inside share one replay each, whichever backward asks first."""

    def __init__(self, stage: Stage, index: int, consumed_now: bool) -> None:
        super().__init__()
        self.stage = stage
        self.index = index
        self.consumed_now = consumed_now  # its whole backward comes right after this forward
        self.groups: list[
            list[weakref.ref[Region]]
        ] = []  # an outermost region, then those recorded inside it
        self.kept = 0  # outermost regions that were plain calls
        self.weight_bytes = 0  # after the input half, of values that the weight half needs
        self.left_by_torch = 0  # what torch's replays for the weight half would leave behind; see weights.py
        self.halved = False  # the input half is over
        self.late: str | None = None  # why nothing was replayed before the gradient, where nobody could
        self.ahead = 0  # bytes that early replays made, at least as much as they hold
        self.ends_with_region = False  # known when the forward is over
        self._around: weakref.WeakKeyDictionary[Region, weakref.ref[Region]] = weakref.WeakKeyDictionary()
        self._keeping = False
        self._whole = False
        self._again: Again | None = None  # while the input half runs
        self._used: tuple[Any, list[Slot]] = (None, [])
        self._twice: set[Any] = set()  # nodes of regions that run in both halves
        self._dropped: dict[
            int, int
        ] = {}  # storages of values that one half has used and the other does not need
        self._inputs: set[int] = set()
        self._last: list[weakref.ref[torch.Tensor]] = []

    def call(self, record: Any, fn: Any, args: Any, kwargs: Any, options: Any) -> Any:
        """Make the call a region, or keep it: a plain call inside which nothing is a region."""
        if self._keeping:
            return fn(*args, **kwargs)
        if here.frame is not None:
            return record(fn, args, kwargs, options)
        place = self.outermost
        if self.stage.keeps(self, place):
            self.kept += 1
            self.stage.report.kept[self.index, _label(place, 0, fn, options)] += 1
            self._keeping = True
            try:
                out = fn(*args, **kwargs)
            finally:
                self._keeping = False
        else:
            out = record(fn, args, kwargs, options)
        self._last = [weakref.ref(t) for t in tensors(out)]
        return out

    def enroll(self, region: Region) -> None:
        super().enroll(region)
        around = region_here()
        if region.inner and self.groups:
            self.groups[-1].append(weakref.ref(region))
            if around is not None:
                self._around[region] = weakref.ref(around)
        else:
            self.groups.append([weakref.ref(region)])

    def replayed(self, region: Region) -> None:
        place, within = self.place(region)
        self.stage.replayed(self, region, place, _label(place, within, region.fn, region.options))

    def asked(self, slot: Slot) -> None:
        """Drop a value at its last use, as without a session: in a whole backward that is the first one.

        In the input half of a split one it depends on the node.
        A slot belongs to one node. A node that does not run again in the weight half is done with its values when
        another node asks; it may ask twice for one.
        """
        if self._whole:
            slot.value = None
        if self._again is None:
            return
        node = current_node()
        if node is not self._used[0]:
            self._drop_used()
            self._used = node, []
        if node is not None and not self._again(node):
            self._used[1].append(slot)
        elif node is not None:
            self._twice.add(node)

    def _drop_used(self) -> None:
        for slot in self._used[1]:
            if slot.value is not None:
                self._dropped.update(value_storages(slot.value))
            slot.value = None
        self._used = None, []

    @property
    def outermost(self) -> int:
        """How many outermost regions this forward has called so far."""
        return len(self.groups) + self.kept

    def made(self, output: Any) -> bool:
        """Whether the last outermost region made all that the stage returned, or what that is a view of."""
        made = [t for ref in self._last if (t := ref()) is not None]
        return all(any(o is t or (o._is_view() and o._base is t) for t in made) for o in tensors(output))

    def replayable(self, region: Region) -> bool:
        """Whether a replay of ``region`` finds its inputs, which are values of the region around it if there is one."""
        ref = self._around.get(region)
        around = ref() if ref is not None else None
        return around is None or all(slot.value is not None for slot in around.living())

    def place(self, region: Region) -> tuple[int, int]:
        """Which outermost region ``region`` is or lies in, and its number inside."""
        for place, group in enumerate(self.groups):
            for within, ref in enumerate(group):
                if ref() is region:
                    return place, within
        raise LookupError("a region of another session")

    def regions(self) -> list[Region]:
        """Those that can still be asked for a value."""
        found = (ref() for group in self.groups for ref in group)
        return [region for region in found if region is not None and region.session is self]

    def newest_first(self) -> list[Region]:
        """The order in which a backward comes to them; what lies inside a region comes after it."""
        order = [ref for group in reversed(self.groups) for ref in (group[0], *reversed(group[1:]))]
        return [region for ref in order if (region := ref()) is not None and region.session is self]

    def held(self) -> int:
        """Bytes of recomputed values, parameters and inputs not counted."""
        return held(self.regions(), self.stage.fixed())

    def begin_whole(self) -> None:
        """The stage is about to take all its gradients at once."""
        self._whole = True

    def begin_input_half(self, outputs: Iterable[Any], inputs: Iterable[Any]) -> None:
        """The stage is about to take the gradients of its inputs only."""
        self._again = Again(outputs, inputs, self.stage.stage.submod.parameters())
        self._inputs = {key for region in self.regions() if not region.inner for key in input_keys(region)}

    def end_input_half(self) -> None:
        """Count what the weight half needs, and what it does not."""
        self._drop_used()
        self._again = None
        waiting = held_storages(self.regions(), self.stage.fixed())
        self.weight_bytes = sum(waiting.values())
        known = self._inputs | self.stage.fixed() | waiting.keys()
        dropped = sum(size for key, size in self._dropped.items() if key not in known)
        self.left_by_torch = dropped * len(self._twice) // max(1, len(self.groups))
        self._twice, self._dropped, self._inputs = set(), {}, set()  # nodes hold their graph
        self.halved = True


def _label(place: int, within: int, fn: Any, options: Any) -> str:
    name = describe(fn, options).removeprefix("region ").split(" (")[0]
    return f"{place}.{within} {name}" if within else f"{place} {name}"
