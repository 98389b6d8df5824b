"""Inputs of a region: what it holds between forward and replay, and how it hands them back.

Every tensor that the call can name is owned: positional, keyword, inside lists, tuples, dicts, named
tuples and dataclasses, and bound in a ``functools.partial``. An owned tensor is a saved tensor of
autograd, so an in-place change before the replay is noticed, outer ``saved_tensors_hooks`` see it, an
enclosing region manages it, and it is freed with the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from distckpt._torch import SavedTensor, make_saved_tensor
from distckpt.engine.errors import InputChanged

_ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})


class Packed:
    """A container whose tensors are owned: ``rebuild`` makes an equal one from the unpacked parts."""

    __slots__ = ("parts", "rebuild")

    def __init__(self, parts: list[Any], rebuild: Callable[[list[Any]], Any]) -> None:
        self.parts = parts
        self.rebuild = rebuild


_Rebuild = Callable[[list[Any]], Any]


def _open(value: Any) -> tuple[list[Any], Callable[[], _Rebuild]] | None:
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


def own(value: Any, keep: Callable[[torch.Tensor], Any] | None = None) -> Any:
    """``value`` with every tensor in it turned into a saved tensor; containers without one stay as they are.

    With ``keep`` a tensor becomes what that returns: a saved tensor, or a :class:`Packed` that makes it again.
    """
    if isinstance(value, torch.Tensor):
        return make_saved_tensor(value, False) if keep is None else keep(value)
    if type(value) in _ATOMS:
        return value
    opened = _open(value)
    if opened is None:
        return value
    children, make_rebuild = opened
    parts = [own(child, keep) for child in children]
    if all(part is child for part, child in zip(parts, children, strict=True)) and not _mutable(value):
        return value
    return Packed(parts, make_rebuild())


def _mutable(value: Any) -> bool:
    # A list that the region itself appends to must start each replay as it was: keep our own copy.
    return type(value) in (list, dict)


def give_back(value: Any, where: str) -> Any:
    """Inverse of :func:`own`, for a replay.

    Raises:
        InputChanged: a tensor was changed in place since the forward.
    """
    kind = type(value)
    if kind is SavedTensor:
        try:
            return value.unpack()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise InputChanged(
                f"input {where} of a region was changed in place between forward and replay",
                why=str(error).split(";")[0],
                fix="pass a clone, or make the change after backward",
            ) from error
    if kind is list:  # a region's own argument list
        return [give_back(part, f"{where}[{i}]") for i, part in enumerate(value)]
    if kind is Packed:
        parts = [give_back(part, f"{where}[{i}]") for i, part in enumerate(value.parts)]
        return value.rebuild(parts)
    return value


def marks(value: Any) -> list[tuple[Any, int]]:
    """Memory and version of every tensor in ``value``, for :func:`check_marks`."""
    return [(weakref.ref(memory(t)), t._version) for t in tensors(value)]


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
        if now._version > version and at() is memory(now):
            raise InputChanged(
                f"tensor {i} of the inputs of a region was changed in place between forward and replay",
                why=f"it is at version {now._version}; the region was recorded with version {version}",
                fix="pass a clone, or make the change after backward",
            )


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in ``value``, in call order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) not in _ATOMS:
        opened = _open(value)
        if opened is not None:
            for child in opened[0]:
                yield from tensors(child)
