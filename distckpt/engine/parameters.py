"""Parameters: a replay reads those that its record read, and what it computes from others is not handed out.

Note [Changed parameters]
    A module's parameters, buffers and child modules are read live. When a record ends the region notes the objects that
    the call can reach, and of a parameter its version and its memory; when a replay starts it looks again. An object
    that was exchanged for another one (``functional_call``, a new ``nn.Parameter``, another layer in a Sequential) is
    put back for the time of the replay. A parameter that was changed in place or through ``.data =`` cannot be: then
    a dispatch mode follows what is computed from it, and what the replay saves of that is :class:`Outdated`. Only a
    gradient that asks for such a value is refused, so an optimizer step after the replay is no error, nor one that
    nothing saved depends on.

    What a sharding engine does is no change: it resizes a parameter's memory, and exchanges sharded for whole ones.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distckpt.engine.inputs import check_marks, give_back, marks, memory, own_tensor
from distckpt.engine.region import Frame, Outdated, here

if TYPE_CHECKING:
    from distckpt.engine.buffers import Holders
    from distckpt.engine.region import Region


_ref = weakref.ref
_Place = tuple[dict[str, Any], str]
_counted = attrgetter("_version")
_storage = torch.Tensor.untyped_storage
_ORDINARY = frozenset({Parameter})
MODULES = "parameters of modules"  # what replays that put some back take turns with


class ModuleState:
    """What the modules and parameters that a call could reach were at the end of its record."""

    __slots__ = ("dicts", "marks", "names", "objects", "parameters", "storages", "swapped", "versions")

    def __init__(
        self, dicts: list[dict[str, Any]], objects: list[Any], parameters: Sequence[torch.Tensor]
    ) -> None:
        self.dicts = dicts
        self.names = [name for d in dicts for name in d]
        self.objects = objects  # what lies in ``dicts``; None for what is swapped
        self.parameters: list[Any] = list(parameters)  # those that are to stay as they are
        self.versions = _versions(parameters)
        self.storages = list(map(_ref, _memories(parameters)))
        # by place: owned tensors that stand where a parameter stands
        self.swapped: dict[int, Any] | None = None
        self.marks: tuple[Any, ...] = ()  # of those, see check_marks

    def same(self) -> bool:
        """Whether all of it is there, unchanged."""
        now = _values(self.dicts)
        return (
            len(now) == len(self.objects)
            and all(map(is_, now, self.objects))
            and _versions(self.parameters) == self.versions
            and all(map(is_, [ref() for ref in self.storages], _memories(self.parameters)))
        )

    def look(self) -> Stale | None:
        """What is another one now; None if that is no matter."""
        found = Stale()
        # FSDP1 takes some away: then the parameters are all that can be compared.
        if [k for d in self.dicts for k in d] == self.names:
            self._compare(found)
        now = _versions(self.parameters)
        for i, (tensor, version, storage) in enumerate(
            zip(self.parameters, self.versions, self.storages, strict=True)
        ):
            if now[i] != version or (memory(tensor) is not storage() and not _moves(tensor)):
                found.changed[id(tensor)] = (tensor, self._name(tensor), version, storage)
        return found if found.changed or found.back else None

    def _compare(self, found: Stale) -> None:
        memo: dict[int, Any] = {}
        for i, place in enumerate((d, name) for d in self.dicts for name in d):
            before, now = self.objects[i], place[0][place[1]]
            if self.swapped is not None and i in self.swapped:
                before = give_back(self.swapped[i], f"the parameter {place[1]!r}", memo)
                found.restored.append(before)
            if now is not before and _is_sharded(now) == _is_sharded(before):
                found.back.append((place, before))
        for then in self.marks:
            check_marks(then, found.restored)
        if self.marks:  # as for a region's inputs
            self.marks = (self.marks[0], marks(found.restored))

    def _name(self, parameter: torch.Tensor) -> str:
        for name, value in zip(self.names, self.objects, strict=True):
            if value is parameter:
                return f"the parameter {name!r}"
        return "a parameter"


def hold(reached: Holders | None, loose: list[Parameter] | None) -> ModuleState:
    """The state of the modules that a call reached, and of ``loose`` parameters, at the end of its record."""
    if reached is None:
        state = ModuleState([], [], list(loose or ()))
    else:
        values = _values(reached.parameters)
        parameters = [t for t in values if t is not None]
        swapped = None
        if not _ORDINARY.issuperset(map(type, parameters)):
            swapped = {i: t for i, t in enumerate(values) if not (t is None or isinstance(t, Parameter))}
            parameters = [t for t in parameters if isinstance(t, Parameter)]
        if loose is not None:
            parameters += loose
        state = ModuleState(
            [*reached.parameters, *reached.others], values + _values(reached.others), parameters
        )
        if swapped:
            owned = {id(t): own_tensor(t) for t in swapped.values()}
            state.swapped = {i: owned[id(t)] for i, t in swapped.items()}
            state.marks = (marks(list(swapped.values())),)
            for i in swapped:
                state.objects[i] = None  # it dies with the graph
    if here.replaying:
        _as_around(state)
    return state


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return [value for d in dicts for value in d.values()]


def _as_around(state: ModuleState) -> None:
    """A region recorded in a replay that reads changed parameters is not to take those for its own."""
    frame = here.frame
    while frame is not None:
        if type(frame) is Frame and frame.stale is not None:
            for i, tensor in enumerate(state.parameters):
                before = frame.stale.changed.get(id(tensor))
                if before is not None:
                    state.versions[i], state.storages[i] = before[2:]
        frame = frame.outer


class Stale:
    """What one replay finds otherwise: objects to put back for its time, and parameters that have changed."""

    def __init__(self) -> None:
        self.back: list[tuple[_Place, torch.Tensor]] = []
        self.restored: list[torch.Tensor] = []  # of the record, from hooks or from autograd
        self.changed: dict[int, tuple[torch.Tensor, str, int, Any]] = {}

    @contextlib.contextmanager
    def around(self, region: Region) -> Iterator[None]:
        """Around the replay of ``region``."""
        found = [(d, k, d.get(k)) for (d, k), _ in self.back]
        try:
            for (d, k), tensor in self.back:
                d[k] = tensor
            if not self.changed:
                yield
                return
            frame = here.frame
            assert type(frame) is Frame  # this replay's own
            frame.stale = self
            follow = _Follow([tensor for tensor, *_ in self.changed.values()])
            with follow:
                yield
            self._mark(region, follow)
        finally:
            for d, k, tensor in found:
                d[k] = tensor

    def _mark(self, region: Region, follow: _Follow) -> None:
        names = ", ".join(sorted({name for _, name, *_ in self.changed.values()}))
        for slot in region.living():
            value = getattr(slot.value, "value", slot.value)  # a doubtful one as well
            if value is None or value._version != slot.meta[3]:
                continue  # changed in place after it was saved: DC112
            if follow.decided or (follow.knows(value) and not self._is_one(value)):
                slot.value = Outdated(value, names)

    def _is_one(self, value: torch.Tensor) -> bool:
        # Autograd keeps a saved leaf by reference: a plain run reads the new numbers too.
        return (
            value.grad_fn is None
            and value._base is None
            and any(
                memory(t) is memory(value)
                and (t.shape, t.stride(), t.storage_offset())
                == (value.shape, value.stride(), value.storage_offset())
                for t, *_ in self.changed.values()
            )
        )


class _Follow(TorchDispatchMode):
    """Knows the memory of everything that is computed from some tensors."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, roots: list[torch.Tensor]) -> None:
        super().__init__()
        self.memory: dict[int, weakref.ref[Any]] = {}
        self.decided = False  # a number was read out of it, and may have chosen what ran
        for root in roots:
            self.note(root)

    def note(self, tensor: torch.Tensor) -> None:
        for key in _memory(tensor):
            self.memory[id(key)] = _ref(key)

    def knows(self, tensor: torch.Tensor) -> bool:
        return any((ref := self.memory.get(id(key))) is not None and ref() is key for key in _memory(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        read = any(map(self.knows, given))
        out = func(*args, **kwargs)
        if read:
            made = [t for t in tree_leaves(out) if t is not None]
            for t in made:
                if isinstance(t, torch.Tensor):
                    self.note(t)
                elif isinstance(t, (bool, int, float, complex)):
                    self.decided = True
            schema = getattr(func, "_schema", None)
            if schema is not None and not (schema.is_mutable or schema.name.startswith("c10d::")):
                return out
            # c10d does not say which of its arguments it writes; any other operator returns or says it
            written = (
                given
                if schema is None or schema.name.startswith("c10d::")
                else _written(schema, args, kwargs)
            )
            for t in written:
                self.note(t)
        return out


def _written(schema: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = [
        args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(_counted, tensors))
    except RuntimeError:  # an inference tensor counts none
        return [0 if t.is_inference() else t._version for t in tensors]


def _memories(tensors: Sequence[torch.Tensor]) -> list[Any]:
    try:
        return list(map(_storage, tensors))
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
    ):  # sparse, a subclass without one, not initialised yet
        return [memory(t) for t in tensors]


def _memory(tensor: torch.Tensor) -> Iterator[Any]:
    """:func:`memory`, of a wrapper's parts as well (a DTensor)."""
    yield memory(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            part = getattr(tensor, name)
            if isinstance(part, torch.Tensor):
                yield from _memory(part)


def _moves(tensor: Any) -> bool:
    # FSDP1 exchanges the memory of its flat parameters: a shard, or all of them gathered.
    return getattr(tensor, "_is_flat_param", False)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "__tensor_flatten__")
