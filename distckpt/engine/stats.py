"""Stats: counts of what the engine did, who is told when a replay fails, and how many bytes regions hold.

Note [What is counted]
    Distinct memory, whatever the number of values and views in it: a value that is a view keeps all of its storage.
    Not counted is memory that is there without any replay: what the caller names (parameters, buffers) and what the
    regions own as their inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch

from distckpt._torch import storage_of
from distckpt.engine.inputs import give_back, tensors
from distckpt.engine.region import Doubtful, Outdated, Region, describe

if TYPE_CHECKING:
    from distckpt.engine.region import Region


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals of this process since its start. Read them before and after, and subtract.

    ``regions`` counts records, ``replays`` counts recomputations (an early-stopped one counts as one).
    Plain integers without a lock: two device threads may lose a count, so they report, never decide.
    """

    regions: int = 0
    replays: int = 0


counters = Counters()

FailureListener = Callable[[str, Exception], None]

# Replaced, never changed in place: a failing thread sees either the old or the new tuple.
_listeners: tuple[FailureListener, ...] = ()


def on_failed_replay(listener: FailureListener) -> Callable[[], None]:
    """Call ``listener(region, error)`` when a replay raises, on its thread, before the error goes on.

    ``region`` is a description for people. The listener must not raise.

    Returns:
        A function that takes the listener off; calling it twice is harmless.
    """
    global _listeners
    _listeners = (*_listeners, listener)

    def remove() -> None:
        global _listeners
        _listeners = tuple(known for known in _listeners if known is not listener)

    return remove


def failed(region: Region, error: Exception) -> None:
    """Tell the listeners that a replay of ``region`` raised ``error``."""
    if not _listeners:
        return
    with contextlib.suppress(
        Exception
    ):  # the description runs user code (__qualname__), and the error matters more
        place = describe(region.fn, region.options)
        for listener in _listeners:
            listener(place, error)


def storages(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Key and bytes of every storage below ``tensor``; a wrapper subclass (DTensor) has those of its parts."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = (getattr(tensor, name) for name in flatten()[0])  # a mesh may be among them
        for part in parts:
            if isinstance(part, torch.Tensor):
                yield from storages(part)
    else:
        yield storage_of(tensor)


def keys(found: Iterable[torch.Tensor]) -> set[int]:
    """What :func:`held` is told to leave out: the memory of these tensors, as long as they live."""
    return {key for tensor in found for key, _ in storages(tensor)}


def held(regions: Iterable[Region], known: AbstractSet[int] = frozenset()) -> int:
    """Bytes of the recomputed values that ``regions`` hold now, without the memory in ``known`` (see :func:`keys`).

    Inputs are left out for regions whose record lay in no other region; the inputs of an inner one are values of
    the outer one.
    """
    return sum(held_storages(regions, known).values())


def held_storages(regions: Iterable[Region], known: AbstractSet[int] = frozenset()) -> dict[int, int]:
    """The bytes that :func:`held` counts, by storage."""
    skip = set(known)
    found: dict[int, int] = {}
    for region in regions:
        values = [slot.value for slot in region.living() if slot.value is not None]
        if not values:
            continue
        if not region.inner:
            skip |= input_keys(region)
        for value in values:
            found.update(value_storages(value))
    return {key: size for key, size in found.items() if key not in skip}


def value_storages(value: Any) -> Iterator[tuple[int, int]]:
    """Key and bytes of every storage of what a slot holds."""
    return storages(value.value if type(value) in (Doubtful, Outdated) else value)


def input_keys(region: Region) -> set[int]:
    """The memory that a region owns as its inputs."""
    inputs = [
        give_back(region.args, "args"),
        give_back(region.kwargs, "kwargs"),
        give_back(region.fn, "function"),
    ]
    return keys(tensors(inputs))
