"""What regions did in this process: how many ran and were replayed, and the bytes they kept at the fullest moment."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.engine.inputs import tensors
from distckpt.engine.record import observe
from distckpt.engine.stats import counters


@dataclass(frozen=True)
class Counts:
    """``kept`` is in bytes: storages of region inputs, parameters aside, each counted once however many regions
    hold it, at the moment when most were held."""

    regions: int
    replays: int
    kept: int


class Tally:
    """Counts from now on until :meth:`stop`."""

    def __init__(self) -> None:
        self._start = counters.regions, counters.replays
        self._lock = (
            threading.RLock()
        )  # a region may die, and call back, in the middle of our own bookkeeping
        self._holders: dict[int, int] = {}  # regions that hold a storage, by its address object
        self._kept = 0
        self._peak = 0
        observe(self._opened)

    def _opened(self, region: Any, held: Any) -> None:
        sizes: dict[int, int] = {}
        for tensor in tensors(held):
            if not isinstance(tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
                storage = _storage(tensor)
                if storage is not None:
                    sizes[storage._cdata] = storage.nbytes()
        with self._lock:
            for key, size in sizes.items():
                holders = self._holders.get(key, 0)
                self._holders[key] = holders + 1
                self._kept += 0 if holders else size
            self._peak = max(self._peak, self._kept)
        weakref.finalize(region, self._died, sizes).atexit = False

    def _died(self, sizes: dict[int, int]) -> None:
        with self._lock:
            for key, size in sizes.items():
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
                    self._kept -= size

    def stop(self) -> Counts:
        """Stop counting; what it came to."""
        observe(None)
        regions, replays = self._start
        return Counts(counters.regions - regions, counters.replays - replays, self._peak)


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own, an XLA tensor
        return None


def bytes_text(count: int) -> str:
    """Bytes for people, in units of 1024."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
