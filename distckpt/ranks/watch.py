"""Watch: compare the order of collectives inside replays over the ranks of each process group, before they go out.

Note [Watch]
    A dispatch mode sees every collective that is issued while a region is replayed, on the thread of the backward and
    on autograd's device threads, which inherit it. Each rank writes down which collective it is about to enter, for
    which region, and meets the other ranks of that group at the store: either all are about to do the same, or all
    raise with both versions side by side. A rank that does not come is named after the timeout. One list is
    kept per set of ranks and not per group: two groups of the same ranks are driven in one order too.
    A region is told from others of its name by its number: regions are counted when their forward issues its first
    collective under the watch.
"""

from __future__ import annotations

import itertools
import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt import _torch_dist
from distckpt.engine.region import describe
from distckpt.engine.state import is_recomputing, region_here
from distckpt.errors import CollectivesDiffer
from distckpt.ranks.agreement import ranks as named
from distckpt.ranks.regionplan import digest
from distckpt.ranks.statement import listed
from distckpt.ranks.store import Channel, Verdict

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_NOT_COLLECTIVE = ("send", "recv_", "recv_any_source_", "wait_tensor", "monitored_barrier_")


class Watch(TorchDispatchMode):
    """Entered around forward and backward on every rank; see ``Coordinator.watch``.

    Args:
        every: how many collectives of a group are compared in one meeting. With 1 each is compared before it goes
            out; with more a difference may show only after the collectives before it, or not before the end.
        timeout: seconds that a rank waits for the others of the group.
    """

    def __init__(self, channel: Channel, *, every: int, timeout: float) -> None:
        super().__init__()
        self.every = every
        self.timeout = timeout
        self.compared = 0
        self._channel = channel
        self._lock = threading.RLock()  # autograd's device threads come through one mode
        self._pending: dict[tuple[int, ...], list[list[str]]] = {}
        self._totals: dict[tuple[int, ...], int] = {}
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next_number = (
            itertools.count()
        )  # not how many are alive: regions die whenever they are collected
        # A name of its own for every watch: ranks that an error left at different places of one meet anew in the next.
        self._topic = f"watch/{channel.number('watch')}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__module__.startswith("torch.distributed.") for kind in types):
            return NotImplemented  # first a DTensor turns into local tensors and collectives, which come here again
        if func.namespace in _NAMESPACES:
            name = func._schema.name.split("::")[1]
            if name not in _NOT_COLLECTIVE and region_here() is not None:
                self._saw(name, (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if exception[0] is None:
            self.finish()

    def _saw(self, name: str, args: Sequence[Any]) -> None:
        region = region_here()
        assert region is not None
        with self._lock:
            if region not in self._numbers:
                self._numbers[region] = next(self._next_number)
            number = self._numbers[region]
        group = _torch_dist.group_of_collective(args) if is_recomputing() else None
        if group is None:
            return
        members = tuple(dist.get_process_group_ranks(group))
        if len(members) < 2:
            return
        place = describe(region.fn, region.options).split(" (")[0]
        entry = [f"{name}({', '.join(_shapes(args))})", f"group {group.group_name}", f"{place} #{number}"]
        with self._lock:
            pending = self._pending.setdefault(members, [])
            pending.append(entry)
            if len(pending) >= self.every:
                self._compare(members, pending)

    def _compare(self, members: tuple[int, ...], pending: list[list[str]]) -> None:
        key = digest(str(members))
        before = self._totals.get(members, 0)
        self._totals[members] = before + len(pending)
        self._pending[members] = []
        verdict = self._channel.meet(
            f"{self._topic}/{key}",
            json.dumps([before, pending]).encode(),
            _judge_order,
            timeout=self.timeout,
            ranks=members,
            subject=f"collective {before + len(pending)} inside replays of {named(members)}, {' '.join(pending[-1])},",
        )
        verdict.raise_error()
        self.compared += len(pending)

    def finish(self) -> None:
        """Compare what has not been compared yet, and that every rank has seen as many as the others of its groups.

        Raises:
            CollectivesDiffer: on every rank.
        """
        lists = [[members, self._totals.get(members, 0), rest] for members, rest in self._pending.items()]
        message = json.dumps(lists).encode()
        subject = "the end of a watch"
        verdict = self._channel.meet(
            f"{self._topic}/end", message, _judge_end, timeout=self.timeout, subject=subject
        )
        verdict.raise_error()
        self.compared += sum(map(len, self._pending.values()))
        self._pending.clear()


def _shapes(args: Any) -> list[str]:
    found: list[str] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}")
        elif isinstance(arg, (list, tuple)):
            found.extend(_shapes(arg))
    return found


def _judge_order(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    said = {rank: json.loads(message) for rank, message in messages.items()}
    return _first_difference({rank: (before, pending) for rank, (before, pending) in said.items()})


def _judge_end(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    said = {rank: json.loads(message) for rank, message in messages.items()}
    groups: dict[tuple[int, ...], dict[int, tuple[int, list[list[str]]]]] = {}
    for rank, lists in said.items():
        for members, before, pending in lists:
            groups.setdefault(tuple(members), {})[rank] = before, pending
    for members, found in groups.items():
        verdict = _first_difference({rank: found.get(rank, (0, [])) for rank in members})
        if verdict.error:
            return verdict
    return Verdict()


def _first_difference(lists: dict[int, tuple[int, list[list[str]]]]) -> Verdict:
    befores = {before for before, _ in lists.values()}
    base = min(befores)
    longest = max(before + len(pending) for before, pending in lists.values())
    for place in range(base, longest):
        answers: dict[str, list[int]] = {}
        for rank, (before, pending) in lists.items():
            if place < before:
                answer = "an earlier one, compared before"
            elif place - before < len(pending):
                answer = " on ".join(pending[place - before][:2]) + f" in {pending[place - before][2]}"
            else:
                answer = "none"
            answers.setdefault(answer, []).append(rank)
        if len(answers) > 1:
            return Verdict.of(
                CollectivesDiffer(
                    f"collective {place + 1} inside replays is not the same on {named(sorted(lists))}",
                    where=listed([f"{named(r)}: {answer}" for answer, r in answers.items()]),
                    why="ranks that enter different collectives wait for each other for ever, or mix their data",
                    fix="replay regions with collectives in one order everywhere: no data-dependent choice of regions, "
                    "the same plan on every rank of the group",
                )
            )
    return Verdict()
