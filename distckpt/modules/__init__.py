"""Modules as regions, in place: ``dc.apply``."""

from __future__ import annotations

from distckpt.modules.applied import Applied, apply, regions
from distckpt.modules.choice import choose
from distckpt.modules.errors import (
    AlreadyRegion,
    BadChoice,
    ModuleGone,
    NeverCalled,
    NoMatch,
    NotAModel,
    Rebound,
    UnknownModel,
)

__all__ = [
    "AlreadyRegion",
    "Applied",
    "BadChoice",
    "ModuleGone",
    "NeverCalled",
    "NoMatch",
    "NotAModel",
    "Rebound",
    "UnknownModel",
    "apply",
    "choose",
    "regions",
]
