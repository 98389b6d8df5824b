"""Modules as regions, in place: ``dc.apply``; names only."""

from distckpt.modules.apply import Applied as Applied
from distckpt.modules.apply import apply as apply
from distckpt.modules.apply import choose_modules as choose_modules
from distckpt.modules.apply import regions as regions
from distckpt.modules.apply import register_library as register_library
