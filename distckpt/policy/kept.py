"""What a selective region keeps of one operator's outputs, and how a replay gets it back."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch

from distckpt._torch import detach_below_autograd, dispatch_mode_is_on, without_dispatch_modes
from distckpt.engine.inputs import memory
from distckpt.policy.errors import SavedOutputChanged


class Kept:
    """One kept tensor, or what the user's hook made of it, with its version: every replay must find it unwritten.

    A hook that hands the operator's own memory back is held to the version of the forward; one that made a copy, to
    the version at which it first handed that out.
    """

    __slots__ = ("memory", "unpack", "value", "version")

    def __init__(self, value: Any, hooks: Any) -> None:
        self.unpack = self.memory = self.version = None
        if isinstance(value, torch.Tensor):
            value = detach_below_autograd(value)
            self.version = value._version
            if hooks is not None:
                self.memory, self.unpack = weakref.ref(memory(value)), hooks[1]
                # what a hook does is no operator of a selective region around either
                with without_dispatch_modes() if dispatch_mode_is_on() else contextlib.nullcontext():
                    value = hooks[0](value)
        self.value = value

    def get(self, may_change: bool, strict: bool, again: bool) -> Any:
        value = self.value if self.unpack is None else self.unpack(self.value)
        if not isinstance(value, torch.Tensor):
            return value
        if self.memory is not None and self.memory() is not (found := memory(value)):
            self.memory, self.version = weakref.ref(found), value._version
        if value._version != self.version and not may_change and (strict or self.memory is None):
            text = "Tensor cached during selective activation checkpoint has been mutated"
            raise (
                SavedOutputChanged(text, fix="do not select operators whose outputs are changed in place")
                if strict
                else RuntimeError(text)
            )
        # Autograd writes its history onto the tensor a mode returns; one that is used again needs a fresh alias.
        return detach_below_autograd(value) if again or self.memory is not None else value


class Entry:
    """A kept output and where it left the generators, if it drew."""

    __slots__ = ("after", "out")

    def __init__(self, out: Any, after: list[tuple[Any, Any]] | None) -> None:
        self.out = out
        self.after = after

    @property
    def val(self) -> Any:
        """The kept tensor of an operator with one output, under torch's name for it."""
        return self.out.value
