"""``dc.rng``: random streams beside the default generators, and named streams over ranks."""

from typing import TYPE_CHECKING

from distckpt.engine.streams import register as register
from distckpt.engine.streams import register_source as register_source
from distckpt.engine.streams import registered as registered

if TYPE_CHECKING:
    from distckpt.ranks.stream_check import check_streams as check_streams
    from distckpt.ranks.streams import seed_streams as seed_streams
    from distckpt.ranks.streams import stream as stream
else:  # named streams belong to ranks, and come when one of them is named
    import importlib

    _RANKS = {
        "check_streams": "distckpt.ranks.stream_check",
        "seed_streams": "distckpt.ranks.streams",
        "stream": "distckpt.ranks.streams",
    }

    def __getattr__(name):
        if name not in _RANKS:
            raise AttributeError(f"module 'distckpt.rng' has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(_RANKS[name]), name)
        return globals()[name]

    def __dir__():
        return sorted({"register", "register_source", "registered", *_RANKS})
