"""Inputs of a region: what it holds between forward and replay, and how it hands them back.

Every tensor that the call can name is owned: positional, keyword, inside lists, tuples, dicts, named
tuples and dataclasses, and bound in a ``functools.partial``. An owned tensor is a saved tensor of
autograd, so an in-place change before the replay is noticed, outer ``saved_tensors_hooks`` see it, an
enclosing region manages it, and it is freed with the graph.

Note [Pinned values]
    A router's choice, a sampled index or a sort order that is recomputed may flip on a tie, and then every shape
    after it differs. A pinned value is kept by every region around it and handed back in the same order in a replay.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch.nn import Parameter

from distckpt._torch import SavedTensor, make_saved_tensor, open_node
from distckpt.engine.region import Frame, Packed, here, refuse
from distckpt.errors import InputChanged, PinMismatch

_Tensor = torch.Tensor
ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})


class Wrapping:
    """A callable of ours that only adds something to a call of ``function``."""

    function: Callable[..., Any]

    def around(self, function: Callable[..., Any]) -> Wrapping:
        """The same around another function."""
        raise NotImplementedError


_Rebuild = Callable[[list[Any]], Any]


def parts_of(value: Any) -> tuple[list[Any], Callable[[], _Rebuild]] | None:
    """Children of a container and a maker of what rebuilds it, or None for a leaf."""
    kind: Any = type(value)
    if kind is list:
        return value, lambda: list
    if kind is tuple:
        return list(value), lambda: tuple
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(value), lambda: lambda parts: kind(*parts)
    if isinstance(value, dict):
        keys = list(value)
        if kind is dict:
            return list(value.values()), lambda: lambda parts: dict(zip(keys, parts, strict=True))
        return list(value.values()), lambda: _refill(value, keys)
    if isinstance(value, functools.partial) and kind is functools.partial:
        names, bound = list(value.keywords), len(value.args)
        parts = [value.func, *value.args, *value.keywords.values()]
        return (
            parts,
            lambda: (
                lambda p: functools.partial(
                    p[0], *p[1 : 1 + bound], **dict(zip(names, p[1 + bound :], strict=True))
                )
            ),
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return [getattr(value, name) for name in names], lambda: _respell(value, names)
    return None


def _refill(original: Any, keys: list[Any]) -> _Rebuild:
    shell = copy.copy(original)
    for key in keys:
        shell[key] = None  # the shell must not keep the tensors alive behind the region's back

    def rebuild(parts: list[Any]) -> Any:
        again = copy.copy(shell)
        for key, part in zip(keys, parts, strict=True):
            again[key] = part
        return again

    return rebuild


def _respell(original: Any, names: list[str]) -> _Rebuild:
    shell = copy.copy(original)
    for name in names:
        object.__setattr__(shell, name, None)  # frozen dataclasses too

    def rebuild(parts: list[Any]) -> Any:
        again = copy.copy(shell)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(again, name, part)
        return again

    return rebuild


class Scan:
    """What one walk over a call has met, so that a thing that the call names twice is owned once."""

    # Class defaults: most calls need none of these.
    seen: dict[int, tuple[Any, Any]] | None = None
    functions: list[Any] | None = None
    keep: Callable[[torch.Tensor], Any] | None = None
    captured: list[torch.Tensor] | None = None  # behind hooks: the tensors that names hold
    hooked = False  # what is saved goes through hooks, which make another tensor of it
    inside = False  # those are the hooks of a region around
    repeats = False
    generators: list[torch.Generator] | None = None
    parameters: list[Parameter] | None = None  # that the call holds by themselves, not in a module
    normalises = False  # a function of the call may hand statistics to a normalisation itself
    modules = False  # a name of the region's function may lead to a module

    def tensor(self, x: torch.Tensor) -> Any:
        """What stands for ``x`` until the replay."""
        if type(x) is not _Tensor:
            self.note_parameter(x)
        if self.keep is not None:
            return self.keep(x)
        if not self.hooked:
            return own_tensor(x)
        if isinstance(x, Parameter):
            return Reference(x)
        seen = self.memory()
        if id(x) in seen:
            self.repeats = True
            if self.inside:
                # dropped; but the replay around, where two objects may stand for it, saves as often
                own_tensor(x)
        else:
            seen[id(x)] = x, own_tensor(x)
        return seen[id(x)][1]

    def memory(self) -> dict[int, tuple[Any, Any]]:
        """What was met, by identity: itself, so that no other object gets its identity, and what stands for it."""
        if self.seen is None:
            self.seen = {}
        return self.seen

    def look(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the functions of a call whose tensors somebody else owns."""
        self.keep = _as_it_is
        own_call(fn, args, kwargs, self)
        self.keep = None

    def generator(self, value: torch.Generator) -> None:
        """Note a generator that the region may draw from."""
        self.generators = [*(self.generators or ()), value]

    def note_parameter(self, x: Any) -> None:
        """Note ``x`` if it is a parameter."""
        if isinstance(x, Parameter):
            self.parameters = [*(self.parameters or ()), x]

    def function(self, fn: Any) -> None:
        """Note a function that the region's function may call."""
        if self.functions is None:
            self.functions = []
        self.functions.append(fn)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class Reference:
    """A parameter behind hooks: the same object in the replay, unchanged."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version


OWNED = (SavedTensor, Packed, Reference)


def own_tensor(x: torch.Tensor) -> Any:
    """A saved tensor of ``x``; an inference tensor, which cannot be one and has no version, as it is."""
    try:
        return make_saved_tensor(x, False)
    except RuntimeError:
        if x.is_inference():
            return x
        raise


def own_call(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scan: Scan
) -> tuple[Any, list[Any], dict[str, Any] | None]:
    """Function, arguments and keywords as a region holds them."""
    if type(fn) is functools.partial:
        fn = _own(fn, scan)
    if scan.hooked or scan.keep is not None:
        owned = [_own(a, scan) for a in args]
    else:
        try:
            # most arguments are tensors of the plain class, which need no method of the scan
            owned = [make_saved_tensor(a, False) if type(a) is _Tensor else _own(a, scan) for a in args]
        except RuntimeError:  # an inference tensor
            owned = [_own(a, scan) for a in args]
    return fn, owned, _own(kwargs, scan) if kwargs else None


def own(value: Any, keep: Callable[[torch.Tensor], Any] | None = None) -> Any:
    """``value`` with every tensor in it turned into a saved tensor; other leaves stay as they are.

    With ``keep`` a tensor becomes what that returns: a saved tensor, or a :class:`Packed` that makes it again.
    """
    scan = Scan()
    scan.keep = keep
    return _own(value, scan)


def _own(value: Any, scan: Scan) -> Any:
    if isinstance(value, torch.Tensor):
        return scan.tensor(value)
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind in _CALLED or isinstance(value, Wrapping):
        scan.function(value)
        return value
    opened = parts_of(value)
    if opened is None:
        if isinstance(value, torch.Generator):
            scan.generator(value)
        return value
    seen = scan.memory()
    if id(value) in seen:
        scan.repeats = True
        known = seen[id(value)][1]
        # a container that holds itself stays, in itself, what it is
        return Packed([], lambda parts: value) if known is value and _mutable(value) else known
    seen[id(value)] = value, value
    children, make_rebuild = opened
    parts = [_own(child, scan) for child in children]
    if _mutable(value) or any(
        part is not child or type(child) in _CALLED for part, child in zip(parts, children, strict=True)
    ):
        packed = Packed(parts, make_rebuild())
        seen[id(value)] = value, packed
        return packed
    return value


_CALLED = (FunctionType, MethodType)


def _mutable(value: Any) -> bool:
    # A list that the region itself appends to must start each replay as it was: keep our own copy.
    return type(value) in (list, dict)


def give_back(value: Any, where: str, memo: dict[int, Any] | None = None) -> Any:
    """Inverse of :func:`own`, for a replay. With ``memo`` what was owned once comes back as one object.

    Raises:
        InputChanged: a tensor was changed in place since the forward.
    """
    kind = type(value)
    if kind is SavedTensor:
        if memo is None:
            return _unpack(value, where)
        if id(value) not in memo:
            memo[id(value)] = _unpack(value, where)
        return memo[id(value)]
    if kind is list:  # a region's own argument list
        return [give_back(part, f"{where}[{i}]", memo) for i, part in enumerate(value)]
    if kind is Packed:
        if memo is not None and id(value) in memo:
            return memo[id(value)]
        parts = [give_back(part, f"{where}[{i}]", memo) for i, part in enumerate(value.parts)]
        again = value.rebuild(parts)
        if memo is not None:
            memo[id(value)] = again
        return again
    if kind is Reference:
        if value.tensor._version != value.version:
            raise _changed(where, f"it is at version {value.tensor._version}, not {value.version}")
        return value.tensor
    return value


def _unpack(saved: Any, where: str) -> torch.Tensor:
    try:
        return saved.unpack()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise _changed(where, str(error).split(";")[0]) from error


def _changed(where: str, why: str) -> InputChanged:
    return InputChanged(
        f"input {where} of a region was changed in place between forward and replay",
        why=why,
        fix="pass a clone, or make the change after backward",
    )


def marks(value: Any) -> list[tuple[Any, int]]:
    """Memory and version of every tensor in ``value``, for :func:`check_marks`."""
    return [(weakref.ref(memory(t)), _version(t)) for t in tensors(value)]


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version  # an inference tensor counts no versions


def memory(x: torch.Tensor) -> Any:
    """An object that two tensors share if and only if they share memory; not an address, which is used again."""
    try:
        return x.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without one
        return x


def check_marks(then: list[tuple[Any, int]], value: Any) -> None:
    """Refuse inputs that are the same memory as at record, changed in place since.

    A user's ``saved_tensors_hooks`` may hand a saved tensor through as it is, and autograd does not compare
    versions then. A copy that a hook made has memory of its own, and is what the hook wants it to be.

    Raises:
        InputChanged: an input was changed.
    """
    for i, ((at, version), now) in enumerate(zip(then, tensors(value), strict=False)):
        if _version(now) > version and at() is memory(now):
            raise InputChanged(
                f"tensor {i} of the inputs of a region was changed in place between forward and replay",
                why=f"it is at version {now._version}; the region was recorded with version {version}",
                fix="pass a clone, or make the change after backward",
            )


def tensors(value: Any, inside: tuple[Any, ...] = ()) -> Iterator[torch.Tensor]:
    """Every tensor in ``value``, in call order; ``inside``: the containers around it, which may hold themselves."""
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) not in ATOMS:
        opened = parts_of(value)
        if opened is not None and all(value is not around for around in inside):
            inside = (*inside, value)
            for child in opened[0]:
                yield from tensors(child, inside)


T = TypeVar("T")


class _Kept:
    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = _version(tensor)


class _Replace(torch.autograd.Function):
    """Gives ``kept`` in the forward and sends the gradient to ``computed``."""

    @staticmethod
    def forward(ctx: Any, computed: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return kept.detach()  # the one way to a new tensor that selective regions do not count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def pin(value: T) -> T:
    """Return ``value``; inside a region, the value of the first forward in every replay.

    Args:
        value: any pytree of tensors and plain values. Tensors that require grad keep their gradient path.

    Returns:
        An equal pytree. Outside a region ``value`` itself.

    Raises:
        PinMismatch: the replay pins more values than the forward did, or other shapes, or a pinned tensor was
            changed in place.
    """
    frame = here.frame
    if frame is None:
        return value
    recording = []
    while frame is not None and type(frame) is not Frame:
        recording.append(frame)
        frame = frame.outer
    if frame is not None:
        value = _recall(frame, value)
    if recording:
        kept = _keep(value)
        for region in recording:  # an outer region must also replay it, when it records the inner one again
            if region.pins is None:
                region.pins = []
            region.pins.append(kept)
    return value


def _recall(frame: Frame, computed: Any) -> Any:
    region = frame.region
    pins = region.pins or ()
    index = frame.pins
    if index >= len(pins):
        if not region.closed:
            return computed
        refuse(
            region,
            PinMismatch(
                f"the replay pins value number {index + 1}, but the forward pinned {len(pins)}",
                why="the replay took another path than the forward",
                fix="pin the value that decides the path, before it is used",
            ),
        )
    frame.pins = index + 1
    try:
        return _restore(pins[index], computed)
    except PinMismatch as error:
        refuse(region, error)


# Not torch's pytree: its closures are cycles, which hold their leaves until the collector runs.


def _keep(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Kept(value)
    opened = open_node(value)
    if opened is None:
        return value
    parts, rebuild = opened
    return rebuild([_keep(part) for part in parts])


def _restore(kept: Any, computed: Any) -> Any:
    if type(kept) is _Kept:
        return _restore_tensor(kept, computed)
    opened = open_node(kept)
    if opened is None:
        return kept
    parts, rebuild = opened
    beside = open_node(computed)
    if type(kept) is not type(computed) or beside is None or len(beside[0]) != len(parts):
        raise PinMismatch(
            f"the replay pins a {type(computed).__name__} where the forward pinned a {type(kept).__name__}, "
            "or one of another length",
            why="the replay took another path than the forward",
            fix="pin the value that decides the path, before it is used",
        )
    return rebuild([_restore(a, b) for a, b in zip(parts, beside[0], strict=True)])


def _restore_tensor(kept: _Kept, computed: Any) -> torch.Tensor:
    tensor = kept.tensor
    if _version(tensor) != kept.version:
        raise PinMismatch(
            f"a pinned {tensor.dtype} tensor of shape {tuple(tensor.shape)} was changed in place after dc.pin()",
            fix="clone the pinned value before changing it",
        )
    if isinstance(computed, torch.Tensor) and computed.requires_grad and computed.shape == tensor.shape:
        return _Replace.apply(computed, tensor)
    return tensor.detach()
