"""Modules as regions, in place: ``dc.apply``."""

from distckpt.modules.applied import Applied as Applied
from distckpt.modules.applied import apply as apply
from distckpt.modules.applied import regions as regions
from distckpt.modules.choice import choose as choose
