"""Ranks as threads of this process, over a store in memory: for rules that need many ranks and no collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distckpt.ranks import World


class CountingStore:
    """A store that notes each request of one rank: its name and the bytes of the values in it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.requests: list[str] = []
        self.sent = 0
        self.received = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        def call(*args: Any) -> Any:
            self.requests.append(name)
            if name in ("set", "compare_set"):
                self.sent += len(args[-1])
            answer = method(*args)
            if name == "get":
                self.received += len(answer)
            if name == "multi_get":
                self.received += sum(map(len, answer))
            return answer

        return call


def on_ranks(
    size: int, run: Callable[[World, Any], Any], *, run_id: str, restart: int = 0, store: Any = None
) -> list[Any]:
    """``run(world, store)`` on ``size`` threads; what each returned or raised, by rank."""
    store = dist.HashStore() if store is None else store
    results: list[Any] = [None] * size

    def rank(number: int) -> None:
        world = World(number, size, number, "threads", restart, run_id)
        try:
            results[number] = run(world, store.clone() if hasattr(store, "clone") else store)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results
