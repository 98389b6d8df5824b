"""Device backends of distckpt: one object per device type, found lazily; needs torch only."""

from __future__ import annotations

from .errors import DistckptError
from .protocol import AutocastState, Backend, Capabilities, MemoryStats, RngState
from .registry import get, known_types, live, register_backend, unregister_backend
from .rule import select

__all__ = [
    "AutocastState",
    "Backend",
    "Capabilities",
    "DistckptError",
    "MemoryStats",
    "RngState",
    "get",
    "known_types",
    "live",
    "register_backend",
    "select",
    "unregister_backend",
]
