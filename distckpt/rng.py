"""``dc.rng``: random streams beside the default generators."""

from distckpt.engine.streams import register as register
from distckpt.engine.streams import register_source as register_source
from distckpt.engine.streams import registered as registered
