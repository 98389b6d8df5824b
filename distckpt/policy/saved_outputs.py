"""What a selective region keeps, and how a replay gets it back.

Note [Changed outputs]
    A kept output must reach every replay unwritten. Its version counter tells, as it does for a saved tensor of
    autograd, but not every tensor over the same memory shares that counter: an unsafe view (every ``x @ w`` of three
    dimensions ends in one) and ``.data`` have their own. While the region is recorded every operator is seen, so
    one that writes into kept memory marks what is kept there, whatever it writes through. A replay does so as well
    with what a user's hook handed out: that is a copy, which only replays write into. After the record only counters
    are left: that of the kept output, and those of the unsafe views that the record made of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from distckpt._torch import detach_below_autograd, dispatch_mode_is_on, without_dispatch_modes
from distckpt.engine.inputs import memory
from distckpt.engine.stats import storages
from distckpt.policy.operators import Operator, tensors


class Changed(Exception):
    """A kept output was written to."""


class SavedOutput:
    """One kept tensor, or what the user's hook made of it, with its version: every replay must find it unwritten.

    A hook that hands the operator's own memory back is held to the version of the forward; one that made a copy, to
    the version at which it first handed that out.
    """

    __slots__ = ("changed", "memory", "others", "unpack", "value", "version")

    def __init__(self, tensor: torch.Tensor, hooks: Any) -> None:
        self.unpack: Any = None
        self.memory: Any = None
        self.changed = False
        self.others: tuple[tuple[torch.Tensor, int], ...] = ()  # unsafe views of it, and their versions
        self.value: Any = detach_below_autograd(tensor)
        self.version = tensor._version
        if hooks is not None:
            self.memory, self.unpack = weakref.ref(memory(tensor)), hooks[1]
            # what a hook does is no operator of a selective region around either
            with without_dispatch_modes() if dispatch_mode_is_on() else contextlib.nullcontext():
                self.value = hooks[0](self.value)

    def get(self, check: bool, strict: bool, again: bool) -> Any:
        """The tensor for a replay, as a new alias where it will be asked for ``again``.

        Raises:
            Changed: it was written to, with ``check``.
        """
        value = self.value
        if self.unpack is not None:
            value = self.unpack(value)
            if self.memory() is not (found := memory(value)):
                self.memory, self.version = weakref.ref(found), value._version
                self.changed, self.others = False, ()
            check = check and strict
            again = True
        if check and (self.changed or value._version != self.version or self._changed_elsewhere()):
            raise Changed
        # Autograd writes its history onto the tensor a mode returns; one that is used again needs a fresh alias.
        return detach_below_autograd(value) if again else value

    def _changed_elsewhere(self) -> bool:
        return any(other._version != version for other, version in self.others)

    def is_in(self, storage: Any) -> bool:
        """Whether this is, or was before a hook took it, in that memory."""
        if self.memory is not None:
            return self.memory() is storage
        return any(memory(part) is storage for part in parts(self.value))


class SavedCall:
    """The kept output of one call, where it left the generators, and how much the region had saved before it."""

    __slots__ = ("after", "at", "out")

    def __init__(self, out: Any, after: list[tuple[Any, Any]] | None, at: int) -> None:
        self.out = out
        self.after = after
        self.at = at

    def moved(self) -> bool:
        """Whether the output's own version counter tells of a change; torch's engine looks at nothing else."""
        return any(kept.value._version != kept.version for kept in saved_in(self.out))


class OperatorCalls:
    """The calls of one operator in one region: how many the record made and the replay has made, and what is kept."""

    __slots__ = ("answer", "beside", "count", "kept", "operator", "plain", "seen")

    def __init__(self, op: Operator, beside: bool, answer: bool | None) -> None:
        self.operator = op
        self.beside = beside  # it is neither counted nor kept
        self.answer = answer  # whether it is kept; None: the policy is asked at each call
        self.plain = not beside and answer is False and not (op.writes or op.undeclared or op.statistics)
        self.count = 0
        self.seen = 0
        self.kept: dict[int, Any] = {}


class SavedOutputs:
    """What one region keeps: the home of every saved output. Both of its contexts have it."""

    __slots__ = ("_fresh", "_places", "calls", "region")

    def __init__(self) -> None:
        self.region: Any = None  # weak: the region holds its contexts
        self.calls: dict[Any, OperatorCalls] = {}
        self._fresh: list[SavedOutput] = []
        self._places: dict[int, list[SavedOutput]] = {}  # by memory; what is fresh is not there yet

    def keep(self, calls: OperatorCalls, index: int, entry: SavedCall) -> None:
        """Keep the output of one call."""
        calls.kept[index] = entry
        self._fresh += saved_in(entry.out)

    @property
    def watches(self) -> bool:
        """Whether there is memory that is not to be written into."""
        return bool(self._fresh or self._places)

    def handed(self, out: Any) -> None:
        """A replay was given this, and later ones will be."""
        self._fresh += [kept for kept in saved_in(out) if kept.unpack is not None]

    def written(self, found: list[torch.Tensor]) -> None:
        """An operator of the record, or of a replay, wrote into these tensors."""
        for tensor in found:
            for kept in self._over(tensor):
                kept.changed = True

    def viewed(self, out: Any) -> None:
        """An operator of the record returned ``out``, perhaps memory that is kept under another version counter."""
        for tensor in tensors(out):
            for kept in self._over(tensor):
                if kept.unpack is None:
                    kept.others = (*kept.others, (detach_below_autograd(tensor), tensor._version))

    def _over(self, tensor: torch.Tensor) -> Iterator[SavedOutput]:
        if not self._fresh and not self._places:
            return
        for kept in self._fresh:
            for part in () if kept.memory is not None else parts(kept.value):
                self._places.setdefault(_place(part), []).append(kept)
            if kept.memory is not None and (storage := kept.memory()) is not None:
                self._places.setdefault(getattr(storage, "_cdata", id(storage)), []).append(kept)
        self._fresh.clear()
        for part in parts(tensor):
            for kept in self._places.get(_place(part), ()):
                if kept.is_in(memory(part)) and _overlaps(kept, part):
                    yield kept

    def let_go(self, reached: int) -> None:
        """The record has ended: what it kept after that many saves is never asked for."""
        self.forget()
        for calls in self.calls.values():
            late = [i for i, entry in calls.kept.items() if entry.at >= reached]
            for i in late:
                del calls.kept[i]

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that are kept; what a user's hook made of an output is the hook's."""
        values = (
            s.value
            for calls in self.calls.values()
            for call in calls.kept.values()
            for s in saved_in(call.out)
        )
        return sum(dict(key for v in values if isinstance(v, torch.Tensor) for key in storages(v)).values())

    def release(self) -> None:
        """Keep nothing any longer: a later replay runs every operator."""
        self.forget()
        for calls in self.calls.values():
            calls.kept.clear()

    def forget(self) -> None:
        """Look no longer where operators write."""
        self._fresh.clear()
        self._places.clear()


def parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors below ``tensor``: itself, or what a wrapper subclass (DTensor) is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
    else:
        for name in flatten()[0]:
            part = getattr(tensor, name)
            if isinstance(part, torch.Tensor):
                yield from parts(part)


def _place(part: torch.Tensor) -> int:
    found = memory(part)
    return getattr(found, "_cdata", id(found))


def _overlaps(kept: SavedOutput, part: torch.Tensor) -> bool:
    if kept.memory is not None or type(kept.value) is not torch.Tensor or type(part) is not torch.Tensor:
        return True
    (a, b), (c, d) = _range(kept.value), _range(part)
    return a < d and c < b


def _range(x: torch.Tensor) -> tuple[Any, Any]:
    """First byte of ``x`` in its storage, and the one behind its last."""
    if x.layout is not torch.strided:
        return 0, 1 << 62
    if x.numel() == 0:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    start = x.storage_offset() * x.element_size()
    return start, start + (last + 1) * x.element_size()


def shares_memory(out: Any, args: Any) -> bool:
    """Whether a result of an operator lies in memory of an argument."""
    places = {_place(part) for t in tensors(args) for part in parts(t)}
    return any(_place(part) in places for t in tensors(out) for part in parts(t))


def each(function: Callable[[Any], Any], out: Any) -> Any:
    """``function`` of every leaf of what an operator returned.

    Not torch's pytree: its closures are cycles, which hold their leaves until the collector runs.
    """
    if isinstance(out, (tuple, list)):
        return type(out)([each(function, part) for part in out])
    if isinstance(out, dict):  # of a higher-order operator
        return {key: each(function, part) for key, part in out.items()}
    return function(out)


def saved_in(out: Any) -> list[SavedOutput]:
    """The kept tensors in the output of one call."""
    if type(out) is SavedOutput:
        return [out]
    found: list[SavedOutput] = []
    if isinstance(out, (tuple, list, dict)):
        for part in out.values() if isinstance(out, dict) else out:
            found += saved_in(part)
    return found
