"""``dc.rng``: random streams beside the default generators, and named streams over ranks."""

from typing import TYPE_CHECKING

from distckpt.engine.streams import register as register
from distckpt.engine.streams import register_source as register_source
from distckpt.engine.streams import registered as registered

if TYPE_CHECKING:
    from distckpt.ranks.rng_states import check_streams as check_streams
    from distckpt.ranks.rng_streams import seed_streams as seed_streams
    from distckpt.ranks.rng_streams import stream as stream

if not TYPE_CHECKING:  # named streams belong to ranks, and come when one of them is named
    import importlib

    _HOMES = {"check_streams": "rng_states", "seed_streams": "rng_streams", "stream": "rng_streams"}
    __all__ = sorted(["register", "register_source", "registered", *_HOMES])

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'distckpt.rng' has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(f"distckpt.ranks.{_HOMES[name]}"), name)
        return globals()[name]

    def __dir__():
        return __all__
