"""Collectives: what a rank sends, in order, seen by a dispatch mode."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Notes every collective by name and size. ``CommDebugMode`` cannot: its module tracker fails in a replay that
    stops early.

    ``calls`` holds ``(name, numel)`` in order: the elements of all tensors that take part, the gathered ones included,
    so that units of different sizes can be told apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls.append((func.overloadpacket.__name__, sum(x.numel() for x in _tensors(args))))
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> dict[str, int]:
        """How often each collective was called."""
        return dict(Counter(name for name, _ in self.calls))

    def sizes(self, part: str) -> list[int]:
        """The sizes of the collectives with ``part`` in their name, in order."""
        return [size for name, size in self.calls if part in name]


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for item in x for t in _tensors(item)] if isinstance(x, list | tuple) else []
