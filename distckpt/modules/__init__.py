"""Modules as regions, in place: ``dc.apply``."""

from __future__ import annotations

from distckpt.modules.applied import Applied, apply, choose, regions
from distckpt.modules.errors import AlreadyRegion, ModuleGone, NeverCalled, NoMatch, Rebound, UnknownModel

__all__ = [
    "AlreadyRegion",
    "Applied",
    "ModuleGone",
    "NeverCalled",
    "NoMatch",
    "Rebound",
    "UnknownModel",
    "apply",
    "choose",
    "regions",
]
