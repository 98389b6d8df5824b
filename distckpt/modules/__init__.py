"""Modules as regions, in place: ``dc.apply``."""

from __future__ import annotations

from distckpt.modules.applied import Applied, apply, choose, regions
from distckpt.modules.errors import AlreadyRegion, ModuleGone, NeverCalled, NoMatch

__all__ = ["AlreadyRegion", "Applied", "ModuleGone", "NeverCalled", "NoMatch", "apply", "choose", "regions"]
