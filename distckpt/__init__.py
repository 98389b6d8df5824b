"""distckpt: recompute activations instead of storing them, exactly, on one device or on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distckpt import errors as errors
    from distckpt._public import *  # noqa: F403
    from distckpt.ranks import Coordinator as Coordinator
    from distckpt.ranks import guard_units as guard_units
else:  # out of the checkers' sight, or any name at all would pass them
    import contextlib
    import importlib
    import sys

    # Where torch is imported already, every name is here at once. Where it is not, `distckpt --help` would otherwise
    # wait seconds for it, so the names come with the first one that is asked for. What only jobs of several ranks use
    # comes when it is named, and so do the errors, which are from every room.
    _RANKS = ("Coordinator", "guard_units")

    def _load():
        names = vars(importlib.import_module("distckpt._public"))
        found = {name: value for name, value in names.items() if not name.startswith("_")}
        globals().update(found)
        return sorted({*found, *_RANKS, "errors"})

    def __getattr__(name):
        if name == "__all__":
            return _load()
        if name == "errors":
            return importlib.import_module("distckpt.errors")
        if name in _RANKS:
            globals()[name] = getattr(importlib.import_module("distckpt.ranks"), name)
            return globals()[name]
        if not name.startswith("_"):
            _load()
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")

    def __dir__():
        return _load()

    if "torch" in sys.modules:
        from distckpt_backends.errors import UnsupportedTorch

        # It comes again with the first name that is asked for. Until then `distckpt doctor` can say what is missing.
        with contextlib.suppress(UnsupportedTorch):
            _load()
