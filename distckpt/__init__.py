"""distckpt: recompute activations instead of storing them, exactly, on one device or on every rank."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distckpt._public import *  # noqa: F403
    from distckpt.ranks import Coordinator as Coordinator

# Where torch is imported already, every name is here at once. Where it is not, `distckpt --help` would otherwise
# wait seconds for it, so the names come with the first one that is asked for. What only jobs of several ranks use
# comes when it is named.
_RANKS = ("Coordinator",)


def _load() -> list[str]:
    names = vars(importlib.import_module("distckpt._public"))
    found = {name: value for name, value in names.items() if not name.startswith("_")}
    globals().update(found)
    return sorted({*found, *_RANKS})


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _load()
    if name in _RANKS:
        globals()[name] = getattr(importlib.import_module("distckpt.ranks"), name)
        return globals()[name]
    if not name.startswith("_"):
        _load()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'distckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_load()})


if "torch" in sys.modules:
    from distckpt_backends.errors import UnsupportedTorch

    # It comes again with the first name that is asked for. Until then `distckpt doctor` can say what is missing.
    with contextlib.suppress(UnsupportedTorch):
        _load()
