"""``dc.rng``: random streams beside the default generators, and named streams over ranks."""

from distckpt.engine.streams import register as register
from distckpt.engine.streams import register_source as register_source
from distckpt.engine.streams import registered as registered
from distckpt.ranks.stream_check import check_streams as check_streams
from distckpt.ranks.streams import seed_streams as seed_streams
from distckpt.ranks.streams import stream as stream
