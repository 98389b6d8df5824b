"""The checkpointing engines that the benchmarks compare, behind one small record."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Engine:
    """One engine under test.

    ``checkpoint`` follows torch's calling convention. ``selective`` builds torch-shaped selective contexts,
    or is None where the engine has none (the cases that need it are then left out for this engine).
    """

    name: str
    checkpoint: Callable[..., Any]
    selective: Callable[..., Any] | None
    options: dict[str, Any]

    def region(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``fn`` as one region, with the options that make the engines comparable."""
        return self.checkpoint(fn, *args, **{**self.options, **kwargs})


def load(name: str) -> Engine:
    """Return the engine called ``torch``, ``dc`` or ``compat``, or one named as ``module:attribute``.

    The last form is for prototypes: the attribute is called as ``checkpoint(fn, *args, **options)``.
    """
    if name == "torch":
        import torch.utils.checkpoint as module

        options = {"use_reentrant": False}
        return Engine(name, module.checkpoint, module.create_selective_checkpoint_contexts, options)
    if name == "dc":
        dc = importlib.import_module("distckpt")
        return Engine(name, dc.checkpoint, dc.create_selective_checkpoint_contexts, {})
    if name == "compat":
        compat = importlib.import_module("distckpt.compat")
        options = {"use_reentrant": False}
        return Engine(name, compat.checkpoint, compat.create_selective_checkpoint_contexts, options)
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise SystemExit(f"unknown engine {name!r}: use torch, dc, compat or module:attribute")
    return Engine(name, getattr(importlib.import_module(module_name), attribute), None, {})
