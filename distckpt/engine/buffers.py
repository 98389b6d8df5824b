"""Buffers that a forward changes (BatchNorm statistics, counters) change once, and a replay reads what it read.

Note [Which buffers]
    Those of the modules that the call reaches: the function itself when it is a module, the owner of a bound method,
    arguments, modules bound in a partial, in closure cells, in defaults or read as globals, attributes of an object
    that holds them, two objects deep, and what a function of the same file reaches that is used this way. Finding them
    costs a plain function two dictionary lookups. A value from before the forward is kept for small buffers and for
    those known to change; any other buffer that changes is an error once and kept from then on. Where a function of
    the call names ``batch_norm`` itself, the vectors that the call holds and that need no gradient may be its
    statistics.
"""

from __future__ import annotations

import contextlib
import dis
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from distckpt._torch import BatchNorm, dispatch_mode_is_on, preserve_versions, without_dispatch_modes
from distckpt.errors import BufferChanged

_PLAIN = frozenset({int, float, str, bool, type(None), torch.Tensor})
_OPAQUE = frozenset(
    {ModuleType, type, BuiltinFunctionType, type(None)}
)  # most of what a function reads as a global
_SMALL = 1024  # elements; copying one is cheaper than being wrong about it
_STATISTICS = ("running_mean", "running_var")  # batch_norm writes them without moving their version

_global_names: dict[int, tuple[CodeType, tuple[str, ...]]] = {}  # by identity, as in closure.py
_known_to_change: weakref.WeakKeyDictionary[Module, set[str]] = weakref.WeakKeyDictionary()
_trees: weakref.WeakKeyDictionary[Module, Tree] = weakref.WeakKeyDictionary()


def reached_modules(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Module] | None:
    """The modules that the call ``fn(*args, **kwargs)`` can reach."""
    found: list[Module] = []
    if type(fn) is FunctionType:
        _in_function(fn, found, None)
    else:
        _in_value(fn, found, set())
    for value in args:
        if type(value) not in _PLAIN:
            _in_value(value, found, set())
    if kwargs:
        _in_value(kwargs, found, set())
    return found or None


def _in_value(value: Any, found: list[Module], seen: set[int], deep: int = 2) -> None:
    kind = type(value)
    if kind in _PLAIN or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Module):
        found.append(value)
    elif kind is FunctionType:
        _in_function(value, found, seen)
    elif kind is MethodType:
        _in_value(value.__self__, found, seen)
        _in_value(value.__func__, found, seen)
    elif kind is partial:
        for part in (value.func, *value.args, *value.keywords.values()):
            _in_value(part, found, seen)
    elif kind is list or kind is tuple:
        for part in value:
            _in_value(part, found, seen, deep)
    elif kind is dict:
        for part in value.values():
            _in_value(part, found, seen, deep)
    elif deep and kind.__module__ != "builtins" and not isinstance(value, (type, torch.Tensor, ModuleType)):
        for part in getattr(value, "__dict__", {}).values():  # an object that holds modules
            _in_value(part, found, seen, deep - 1)
        call = getattr(kind, "__call__", None)  # noqa: B004
        if type(call) is FunctionType:
            _in_function(call, found, seen)


def _in_function(fn: Any, found: list[Module], seen: set[int] | None) -> None:
    code = fn.__code__
    known = _global_names.get(id(code))
    if known is None:
        known = _global_names[id(code)] = code, tuple(_names(code))
    for name in known[1]:
        value = fn.__globals__.get(name)
        if type(value) in _OPAQUE:
            continue
        if type(value) is not FunctionType or value.__globals__ is fn.__globals__:
            seen = set() if seen is None else seen
            _in_value(value, found, seen)
    for cell in fn.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            continue
        if type(value) not in _PLAIN:
            seen = set() if seen is None else seen
            _in_value(value, found, seen)
    if fn.__defaults__ or fn.__kwdefaults__:
        for value in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
            if type(value) not in _PLAIN:
                _in_value(value, found, set() if seen is None else seen)


def _names(code: CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(_names(c) for c in code.co_consts if type(c) is CodeType))


class Holders(NamedTuple):
    """The dicts in which the modules that a call reaches hold their state."""

    owners: list[Module]  # those that have buffers
    parameters: list[dict[str, Any]]
    others: list[dict[str, Any]]  # child modules and buffers


class Tree:
    """The modules below one module, found anew when a module or buffer was added or removed."""

    __slots__ = ("modules", "scripted", "sizes")

    def __init__(self, root: Module) -> None:
        # Weak: the tree is the value of a weak dictionary whose key is one of these, and a child may know its parent.
        modules = list(root.modules())
        # TorchScript's dicts are none, and make other tensor objects each time
        self.modules = [weakref.ref(m) for m in modules if isinstance(m._parameters, dict)]
        self.scripted = [weakref.ref(m) for m in modules if not isinstance(m._parameters, dict)]
        self.sizes = self.look()[1]

    def look(self) -> tuple[Holders, list[int]]:
        """The state of the modules, and how much of it each one has."""
        modules = [m for ref in self.modules if (m := ref()) is not None]
        others = [d for m in modules for d in (m._modules, m._buffers)]
        sizes = list(map(len, others))
        found = Holders([m for m in modules if m._buffers], [m._parameters for m in modules], others)
        if self.scripted:
            scripted = [m for ref in self.scripted if (m := ref()) is not None]
            found.owners.extend(m for m in scripted if m._buffers)
            sizes.extend(len(d) for m in scripted for d in (m._modules, m._buffers))
        return found, sizes


def holders(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Holders | None:
    """The state of the modules that the call ``fn(*args, **kwargs)`` can reach; None if it reaches none."""
    roots = reached_modules(fn, args, kwargs)
    if roots is None:
        return None
    found = [_holders(root) for root in roots]
    if len(found) == 1:
        return found[0]
    return Holders(
        [m for one in found for m in one.owners],
        [d for one in found for d in one.parameters],
        [d for one in found for d in one.others],
    )


def _holders(root: Module) -> Holders:
    tree = _trees.get(root)
    if tree is not None:
        found, sizes = tree.look()
        if sizes == tree.sizes:
            return found
    tree = _trees[root] = Tree(root)
    return tree.look()[0]


class _Entry:
    """One buffer before the forward."""

    __slots__ = ("before", "key", "owner", "replaced", "statistic", "tensor", "version")

    def __init__(self, owner: Module | _Loose, key: str, tensor: torch.Tensor) -> None:
        self.owner = owner
        self.key = key
        self.tensor = tensor
        self.version = tensor._version
        self.replaced = False  # by the region, with another tensor
        known = _known_to_change.get(owner, ()) if isinstance(owner, Module) else (key,)
        self.statistic = not isinstance(owner, Module) or (isinstance(owner, BatchNorm) and owner.training)
        keep = self.statistic or tensor.numel() <= _SMALL or key in known
        self.before = tensor.detach().clone() if keep else None

    def changed(self) -> bool:
        if self.statistic:  # the normalisation kernels write running statistics without moving their version
            return True
        return self.owner._buffers.get(self.key) is not self.tensor or self.tensor._version != self.version


def watch(owners: list[Module]) -> Buffers | None:
    """The buffers of ``owners``, as they are now; None when there are none."""
    entries = []
    # which buffers are copied is no matter of a mode around: it may differ between record and replay
    with without_dispatch_modes() if dispatch_mode_is_on() else contextlib.nullcontext():
        for owner in dict.fromkeys(owners):
            for key, tensor in owner._buffers.items():
                if tensor is not None:
                    entries.append(_Entry(owner, key, tensor))
    return Buffers(entries) if entries else None


class _Loose:
    """A tensor of the call itself, as if a module held it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._buffers: dict[str, torch.Tensor | None] = {"statistic": tensor}


def with_statistics(found: Buffers | None, held: Iterable[torch.Tensor]) -> Buffers | None:
    """``found``, and those tensors that may be statistics which the region hands to a normalisation itself."""
    entries = [
        _Entry(_Loose(t), "statistic", t)
        for t in {id(t): t for t in held}.values()
        if t.dim() == 1 and t.is_floating_point() and not t.requires_grad and not t.is_inference()
    ]
    return Buffers([*(found.entries if found else ()), *entries]) if entries else found


class Buffers:
    """Buffers of one region. After :meth:`changes` only those that the forward changed."""

    __slots__ = ("entries",)

    def __init__(self, entries: list[_Entry]) -> None:
        self.entries = entries

    def changes(self, where: str) -> Buffers | None:
        """Keep what the forward changed; None when it changed nothing.

        Raises:
            BufferChanged: one of them has no copy from before the forward.
        """
        changed = [e for e in self.entries if e.changed()]
        if not changed:
            return None
        lost = []
        for e in changed:
            if isinstance(e.owner, Module):
                _known_to_change.setdefault(e.owner, set()).add(e.key)
            e.replaced = e.owner._buffers.get(e.key) is not e.tensor
            if e.replaced and e.tensor._version == e.version:
                e.before = e.tensor  # not written: the old one still has the old values
            if e.before is None:
                lost.append(e.key)
        if lost:
            raise BufferChanged(
                f"the forward of a region changed the buffers {', '.join(lost)} for the first time",
                where=where,
                why="they are large and not known to change, so no copy was made, and a replay would read new values",
                fix="run this step again: from now on they are kept. Or change them outside the region",
            )
        return Buffers(changed)

    def tensors(self) -> list[torch.Tensor]:
        """The live buffers."""
        return [t for e in self.entries if (t := e.owner._buffers.get(e.key)) is not None]

    def places(self) -> tuple[str, ...]:
        """Names for what is rewound, by which replays take turns."""
        things = {id(e.owner if isinstance(e.owner, Module) else e.tensor) for e in self.entries}
        return tuple(f"buffers of {thing}" for thing in things)

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Give the forward's buffers to a replay, and today's values back after it."""
        found = [(e, e.owner._buffers.get(e.key)) for e in self.entries]
        written: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            try:
                for e, now in found:
                    assert e.before is not None
                    if e.replaced or (
                        now is not None and (now.shape, now.dtype) != (e.before.shape, e.before.dtype)
                    ):
                        # A value that the replay saves of it stays what it is after the replay. So it is the tensor
                        # itself, and a copy where the region wrote it before it was replaced.
                        e.owner._buffers[e.key] = e.before if e.before is e.tensor else e.before.clone()
                    elif now is not None:
                        written.append((now, now.detach().clone()))
                        with preserve_versions((now,)):
                            now.copy_(e.before)
                with torch.enable_grad():
                    yield
            finally:
                for now, value in written:
                    with preserve_versions((now,)):
                        now.copy_(value)
                for e, now in found:
                    e.owner._buffers[e.key] = now
