"""Buffers that a forward changes (BatchNorm statistics, counters) change once, and a replay reads what it read.

Note [Which buffers]
    Those of the modules that the call reaches: the function itself when it is a module, the owner of a bound method,
    modules bound in a partial, in closure cells or read as globals. Finding them costs a plain function two
    dictionary lookups. A value from before the forward is kept for small buffers and for those known to change;
    any other buffer that changes is an error once and kept from then on.
"""

from __future__ import annotations

import contextlib
import dis
import weakref
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase

from distckpt._torch import preserve_versions
from distckpt.engine.errors import BufferChanged

_PLAIN = frozenset({int, float, str, bool, type(None), torch.Tensor})
_SMALL = 1024  # elements; copying one is cheaper than being wrong about it

_global_names: dict[CodeType, tuple[str, ...]] = {}
_known_to_change: weakref.WeakKeyDictionary[Module, set[str]] = weakref.WeakKeyDictionary()
_trees: weakref.WeakKeyDictionary[Module, _Tree] = weakref.WeakKeyDictionary()


def reached_modules(fn: Any) -> list[Module] | None:
    """The modules that calling ``fn`` can reach without going through its arguments."""
    kind = type(fn)
    if kind is FunctionType:
        return _reached_by_function(fn)
    if isinstance(fn, Module):
        return [fn]
    if kind is MethodType:
        owner = fn.__self__
        found = _reached_by_function(fn.__func__) or []
        return [owner, *found] if isinstance(owner, Module) else found
    if kind is partial:
        bound = [m for v in (*fn.args, *fn.keywords.values()) for m in _modules_in(v)]
        return [*(reached_modules(fn.func) or ()), *bound]
    call = kind.__call__ if callable(fn) else None
    return _reached_by_function(call) if type(call) is FunctionType else None


def _modules_in(value: Any) -> list[Module]:
    if isinstance(value, Module):
        return [value]
    if type(value) in (list, tuple):
        return [v for v in value if isinstance(v, Module)]
    owner = value.__self__ if type(value) is MethodType else None
    return [owner] if isinstance(owner, Module) else []


def _reached_by_function(fn: Any) -> list[Module] | None:
    found: list[Module] | None = None
    code = fn.__code__
    names = _global_names.get(code)
    if names is None:
        used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        names = _global_names[code] = tuple(used)
    for name in names:
        value = fn.__globals__.get(name)
        if isinstance(value, Module):
            found = [*(found or ()), value]
    for cell in fn.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            continue
        if type(value) not in _PLAIN:
            found = [*(found or ()), *_modules_in(value)]
    return found


class _Tree:
    """The modules below one module that have buffers, rebuilt when a module or buffer was added or removed."""

    __slots__ = ("owners", "sizes")

    def __init__(self, root: Module) -> None:
        modules = list(root.modules())
        self.sizes = [(d, len(d)) for m in modules for d in (m._modules, m._buffers)]
        # Weak: the tree is the value of a weak dictionary whose key is one of these modules.
        self.owners = [weakref.ref(m) for m in modules if m._buffers]

    def valid(self) -> bool:
        return all(len(d) == n for d, n in self.sizes)


def _owners(root: Module) -> list[Module]:
    tree = _trees.get(root)
    if tree is None or not tree.valid():
        tree = _trees[root] = _Tree(root)
    return [m for ref in tree.owners if (m := ref()) is not None]


class _Entry:
    """One buffer before the forward."""

    __slots__ = ("before", "key", "owner", "statistic", "tensor", "version")

    def __init__(self, owner: Module, key: str, tensor: torch.Tensor) -> None:
        self.owner = owner
        self.key = key
        self.tensor = tensor
        self.version = tensor._version
        self.statistic = isinstance(owner, _NormBase) and owner.training
        keep = self.statistic or tensor.numel() <= _SMALL or key in _known_to_change.get(owner, ())
        self.before = tensor.detach().clone() if keep else None

    def changed(self) -> bool:
        if self.statistic:  # the normalisation kernels write running statistics without moving their version
            return True
        return self.owner._buffers.get(self.key) is not self.tensor or self.tensor._version != self.version


def watch(fn: Any) -> Buffers | None:
    """The buffers that calling ``fn`` may change, as they are now; None when there are none."""
    roots = reached_modules(fn)
    if not roots:
        return None
    entries = []
    for owner in dict.fromkeys(m for root in roots for m in _owners(root)):
        for key, tensor in owner._buffers.items():
            if tensor is not None:
                entries.append(_Entry(owner, key, tensor))
    return Buffers(entries) if entries else None


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
            _known_to_change.setdefault(e.owner, set()).add(e.key)
            if e.owner._buffers.get(e.key) is not e.tensor and e.tensor._version == e.version:
                e.before = e.tensor  # replaced, not written: the old one still has the old values
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

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Give the forward's buffers to a replay, and today's values back after it."""
        held: list[tuple[_Entry, torch.Tensor, torch.Tensor]] = []
        for e in self.entries:
            now = e.owner._buffers.get(e.key)
            if now is not None:
                held.append((e, now, now.detach().clone()))
        with torch.no_grad():
            try:
                for e, now, _ in held:
                    assert e.before is not None
                    if now.shape == e.before.shape and now.dtype == e.before.dtype:
                        with preserve_versions((now,)):
                            now.copy_(e.before)
                    else:
                        e.owner._buffers[e.key] = e.before.clone()
                with torch.enable_grad():
                    yield
            finally:
                for e, now, value in held:
                    with preserve_versions((now,)):
                        now.copy_(value)
                    e.owner._buffers[e.key] = now
