"""Takes private names out of torch, one at a time, and prints what is said when each is needed (as JSON)."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

ROOMS = ("distckpt_backends._torch", "distckpt._torch", "distckpt._torch_dist")


@contextlib.contextmanager
def without(name: str) -> Iterator[int]:
    """``name`` (and what stands after a bar) deleted; how many places it was deleted from."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *way, last = path.split(".")
    for part in way:
        owner = getattr(owner, part)
    gone: list[tuple[Any, str, Any]] = []
    kinds = owner.__mro__ if isinstance(owner, type) else (owner, *type(owner).__mro__)
    for holder in kinds:
        for wanted in last.split("|"):
            if wanted in getattr(holder, "__dict__", ()):
                with contextlib.suppress(TypeError, AttributeError):  # a class of C++
                    value = vars(holder)[wanted]
                    delattr(holder, wanted)
                    gone.append((holder, wanted, value))
    try:
        yield len(gone)
    finally:
        for holder, wanted, value in gone:
            setattr(holder, wanted, value)


def use(room: str, feature: str) -> str:
    """What an import of distckpt and then ``feature`` come to, without the modules that are there already."""
    for module in [m for m in sys.modules if m.partition(".")[0] in ("distckpt", "distckpt_backends")]:
        del sys.modules[module]
    dc = importlib.import_module("distckpt")
    importlib.import_module("distckpt.cli.main")
    try:
        _ = dc.checkpoint
        importlib.import_module(room).NAMES.need(feature)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    tables = {room: importlib.import_module(room).NAMES.table for room in ROOMS}
    for name in (name for table in tables.values() for names in table.values() for name in names):
        importlib.import_module(name.partition(":")[0])  # while nothing is missing
    said: dict[str, str | None] = {}
    for room, table in tables.items():
        for feature, names in table.items():
            for name in names:
                with without(name) as places:
                    said[name] = (use(room, feature) or None) if places else None
    print(json.dumps(said))
