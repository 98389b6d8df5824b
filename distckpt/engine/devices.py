"""The single-device-type rule: CPU plus exactly one other type.

``meta`` and CPU tensors never count. Of several types CUDA is chosen, else the first met.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from distckpt_backends import Backend
from distckpt_backends.rule import select

from distckpt.errors import BadOption, MixedDeviceTypes

_RULES = ("error", "warn", "all")
_rule: ContextVar[str | None] = ContextVar("distckpt.devices.rule", default=None)


class _Rule(contextlib.AbstractContextManager[None]):
    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __exit__(self, *exc: object) -> None:
        _rule.set(self._previous)


def rule(name: str) -> contextlib.AbstractContextManager[None]:
    """What a region does when its inputs live on two device types besides the CPU.

    ``"error"`` refuses (the default of ``dc.*``), ``"warn"`` stashes one type and warns (torch's behaviour, and
    the default of ``dc.compat``), ``"all"`` stashes every type met. Takes effect at once in this context
    and in contexts copied from it later; as a context manager it is undone on exit.

    Raises:
        BadOption: an unknown rule.
    """
    if name not in _RULES:
        raise BadOption(f"unknown device rule {name!r}", fix=f"use one of {', '.join(_RULES)}")
    undo = _Rule(_rule.get())
    _rule.set(name)
    return undo


def current_rule(default: str) -> str:
    """The rule in force here, or ``default`` when nobody set one."""
    return _rule.get() or default


class DefaultDeviceType:
    """The device type whose random state a region stashes when no input tensor names one.

    Starts as the current accelerator's type, or ``"cpu"`` on a machine without one.
    """

    _type: str | None = None

    @staticmethod
    def set_device_type(device: str = "cuda") -> None:
        """Use ``device`` (a type such as ``"cuda"``) from now on, in the whole process."""
        DefaultDeviceType._type = device

    @staticmethod
    def get_device_type() -> str:
        """The device type in use."""
        if not DefaultDeviceType._type:
            found = torch.accelerator.current_accelerator(True)
            DefaultDeviceType._type = found.type if found else "cpu"
        return DefaultDeviceType._type


MIXED_WARNING = (
    "Tensor arguments, excluding CPU tensors, are detected on at least two types of devices. "
    "Only {chosen} random state is stashed and restored; a draw on {others} inside the region would be "
    "different in the recomputation, and gradients with it.\nDevice types: {types} first device type: {first}"
)


def device_types(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Distinct types besides CPU and meta, in the order met."""
    seen: dict[str, None] = {}
    for tensor in tensors:
        kind = tensor.device.type
        if kind != "cpu" and kind != "meta":
            seen.setdefault(kind)
    return list(seen)


def choose(types: list[str], rule_name: str, where: str) -> list[str]:
    """The device types to stash, by the rule.

    Raises:
        MixedDeviceTypes: more than one type under the rule ``"error"``.
    """
    if len(types) <= 1:
        return types
    chosen = select(types)
    assert chosen is not None
    if rule_name == "all":
        return types
    if rule_name == "error":
        raise MixedDeviceTypes(
            f"inputs of a region live on {' and '.join(types)}",
            where=where,
            why="a region stashes the random state of the CPU and one other device type",
            fix='move the inputs to one type, or choose dc.devices.rule("all") to stash every type',
        )
    others = ", ".join(t for t in types if t != chosen)
    text = MIXED_WARNING.format(chosen=chosen, others=others, types=sorted(types), first=types[0])
    warnings.warn(text, stacklevel=5)
    return [chosen]


def stashed_backends(types: list[str], live: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """Of the live backends, those whose generators a region with inputs on ``types`` stashes."""
    if types:
        return tuple(b for b in live if b.device_type in types)
    if len(live) == 1:
        return live
    default: Any = DefaultDeviceType.get_device_type()
    return tuple(b for b in live if b.device_type == default) or live[:1]
