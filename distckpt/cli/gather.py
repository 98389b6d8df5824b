"""What every rank found, brought to rank 0 through torchrun's store: no process group, no device, no network guess.

A rank that hangs or dies is missing, and is named; nobody waits longer than the timeout.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from distckpt.cli.launched import Place

T = TypeVar("T")


class Ranks:
    """The ranks of one job. Alone, everything is immediate."""

    def __init__(self, place: Place, environment: Mapping[str, str], timeout: float) -> None:
        """Meets the store. Raises ``torch.distributed.DistNetworkError`` or ``DistStoreError`` when it cannot."""
        self.place = place
        self._timeout = timeout
        self._serves = False
        if place.size == 1:
            return
        # torchrun's agent serves a store already; under another launcher rank 0 does.
        self._serves = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(
            place.address,
            place.port,
            None,
            self._serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"distckpt/doctor/{attempt}", store)

    def bring(self, mine: Any) -> list[Any]:
        """Rank 0: what each rank brought, by rank, None for those that did not in time. Elsewhere: nothing."""
        if self.place.size == 1:
            return [mine]
        if self.place.rank != 0:
            self._store.set(f"found/{self.place.rank}", json.dumps(mine))
            return []
        end = time.monotonic() + self._timeout
        others = [self._wait(f"found/{rank}", end) for rank in range(1, self.place.size)]
        return [mine, *(None if text is None else json.loads(text) for text in others)]

    def follow(self, lead: Callable[[], T]) -> T:
        """Rank 0 runs ``lead``; every rank returns what it returned, and nobody leaves before it has.

        A launcher stops all ranks when the first one fails, so rank 0 must have printed by then.
        """
        if self.place.size == 1:
            return lead()
        if self.place.rank == 0:
            verdict = lead()
            self._store.set("verdict", json.dumps(verdict))
            if self._serves:
                end = time.monotonic() + 10
                for rank in range(1, self.place.size):
                    self._wait(f"left/{rank}", end)
            return verdict
        text = self._wait("verdict", time.monotonic() + 2 * self._timeout)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.place.rank}", "")
        return json.loads(text) if text is not None else 1  # type: ignore[return-value]

    def _wait(self, key: str, end: float) -> str | None:
        try:
            self._store.wait([key], timedelta(seconds=max(0.05, end - time.monotonic())))
            return self._store.get(key).decode()
        except RuntimeError:  # a timeout, or a store that went away with its rank
            return None
