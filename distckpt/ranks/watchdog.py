"""Watchdog: a replay that failed on one rank, or entered another collective than its peers, is an error on all of them.

Note [Desync check]
    A dispatch mode sees every collective that is issued while a region is replayed, on the thread of the backward and
    on autograd's device threads, which inherit it. Each rank writes down which collective it is about to enter, for
    which region, and meets the other ranks of that group at the store: either all are about to do the same, or all
    raise with both versions side by side. A rank that does not come is named after the timeout. One list is
    kept per set of ranks and not per group: two groups of the same ranks are driven in one order too.
    A region is told from others of its name by its number: regions are counted when their forward issues its first
    collective under the watch.

Note [Watchdog]
    The engine tells us when a replay raises; the rank writes that under one key of the store. On every rank a thread
    with a connection of its own looks for the key (once a second; at 4,096 ranks every four, so that the store sees a
    thousand requests a second and no more). The connection is made by that thread, when its turn comes, and
    not by the check: the server is blocked while it looks up the name of whoever connects, for seconds if all come at
    once. Before the failed rank's error goes on
    it waits until all have heard, a few seconds at most: its process is likely to end then, and a launcher that sees
    this stops the others at once. Who hears prints one line, and its training thread gets ``RemoteReplayFailed``:

    1. A meeting that it waits in ends at once with that verdict.
    2. Anywhere else the exception is set on it from outside and lands at its next bytecode.
    3. A thread blocked in a collective runs no bytecode. NCCL communicators are aborted, which ends the collective.
       Gloo's cannot be (measured on torch 2.9 and 2.13: ``abort`` returns and the wait goes on), but they fail as soon
       as the failed rank's process is gone, which is what its error normally leads to; then the exception lands.
    4. When it has not landed after ``grace`` seconds (a collective still waits, or another call runs that long), the
       error is printed and the process ends with ``EXIT_CODE``: the launcher stops the job, and nobody waits for the
       collective's own timeout (30 minutes for gloo).
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt import _torch_dist
from distckpt.engine.region import describe, is_recomputing, region_here
from distckpt.engine.stats import on_failed_replay
from distckpt.errors import CollectivesDiffer, RemoteReplayFailed
from distckpt.ranks.plan import digest, listed
from distckpt.ranks.store import Channel, Verdict, named_ranks

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_NOT_COLLECTIVE = ("send", "recv_", "recv_any_source_", "wait_tensor", "monitored_barrier_")


EXIT_CODE = 86
_EVERY = 1.0  # seconds between two looks
_LOOKS = 1000  # per second, over all ranks, at most
# Per second, over all ranks, at most. The server looks up the name of whoever connects, and torch's is blocked
# meanwhile: of 64 at once, or of 200 a second, some look-ups took 5 s here, and of 20 a second none.
_CONNECTIONS = 20


class DesyncCheck(TorchDispatchMode):
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
            subject=f"collective {before + len(pending)} inside replays of {named_ranks(members)}, "
            f"{' '.join(pending[-1])},",
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
                    f"collective {place + 1} inside replays is not the same on {named_ranks(sorted(lists))}",
                    where=listed([f"{named_ranks(r)}: {answer}" for answer, r in answers.items()]),
                    why="ranks that enter different collectives wait for each other for ever, or mix their data",
                    fix="replay regions with collectives in one order everywhere: no data-dependent choice of regions, "
                    "the same plan on every rank of the group",
                )
            )
    return Verdict()


_lock = threading.Lock()
_running: dict[tuple[str, int], Watchdog] = {}  # by job and rank, as ranks may be threads of one process


def start(channel: Channel) -> Watchdog:
    """The alarm of this rank, shared by all coordinators of the process. Each calls :meth:`Watchdog.stop` once."""
    with _lock:
        key = (channel.namespace, channel.world.rank)
        alarm = _running.get(key)
        if alarm is not None and not alarm.watches():
            alarm._end()
            alarm = None
        if alarm is None:
            alarm = _running[key] = Watchdog(channel)
        alarm.serve(channel)
        return alarm


class Watchdog:
    """Started on every rank, on the thread that trains, by :func:`start`.

    Args:
        grace: seconds that a thread blocked in a collective is given to come out before the process is ended.
    """

    def __init__(self, channel: Channel, *, grace: float = 10.0) -> None:
        self.grace = grace
        self._channel = channel
        self._key = f"{channel.namespace}/alarm"
        self._thread_id = threading.get_ident()
        self._channels: list[Channel] = []
        self._connecting = threading.Lock()
        self._connection: Any = None
        self._group = dist.group.WORLD  # None: there is none yet
        self._every = max(_EVERY, channel.world.size / _LOOKS)
        self._stopped = threading.Event()
        self._landed = threading.Event()
        self._failed_here = False
        self._remove = on_failed_replay(self._raise_alarm)
        self._watcher = threading.Thread(target=self._watch, name="distckpt-alarm", daemon=True)
        self._watcher.start()
        atexit.register(self._end)

    def watches(self) -> bool:
        """Whether it still does, for the process group that is there now."""
        return self._watcher.is_alive() and self._group in (None, dist.group.WORLD)

    def serve(self, channel: Channel) -> None:
        """Ring in the meetings of ``channel`` too."""
        self._channels.append(channel)

    def stop(self, channel: Channel) -> None:
        """Serve ``channel`` no more. Without any other, stop watching and listening."""
        with _lock:
            if channel not in self._channels:
                return
            self._channels.remove(channel)
            if self._channels:
                return
            key = (self._channel.namespace, self._channel.world.rank)
            if _running.get(key) is self:
                del _running[key]
        self._end()

    def _end(self) -> None:
        self._remove()
        self._stopped.set()
        atexit.unregister(self._end)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(timeout=5)

    def _store(self) -> Any:
        """A connection of our own: the training thread's is locked while it waits for a verdict."""
        with self._connecting:
            if self._connection is None:
                self._connection = self._channel.store.clone()
            return self._connection

    def _raise_alarm(self, region: str, error: Exception) -> None:
        if self._failed_here:
            return
        self._failed_here = True
        said = {"rank": self._channel.world.rank, "region": region, "error": type(error).__name__}
        said["message"] = str(error).split("\n", 1)[0][:500]
        try:
            store = self._store()
            if store.add(f"{self._key}/claim", 1) == 1:  # the first failure is the one that all hear of
                store.set(self._key, json.dumps(said))
            self._wait_until_heard(store)
        except dist.DistError as trouble:  # the error itself must reach the caller
            print(
                f"distckpt: the failed replay could not be told to the other ranks: {trouble}",
                file=sys.stderr,
            )

    def _wait_until_heard(self, store: Any) -> None:
        end = time.monotonic() + 3 * self._every
        while time.monotonic() < end:
            # A rank that fails as well counts as one that has heard.
            if store.add(f"{self._key}/heard", 0) >= self._channel.world.size - 1:
                return
            time.sleep(self._every / 20)

    def _watch(self) -> None:
        if self._stopped.wait(self._channel.world.rank / _CONNECTIONS):
            return
        try:
            store = self._store()
        except RuntimeError:  # the store is gone, and with it the job
            return
        while not self._stopped.wait(self._every):
            if self._group not in (None, dist.group.WORLD):
                return  # this rank has left
            try:
                if not store.check([self._key]):
                    continue
                said = json.loads(store.get(self._key))
                if said["rank"] == self._channel.world.rank:
                    return
                store.add(f"{self._key}/heard", 1)
            except RuntimeError:
                return
            return (
                None if self._failed_here else self._ring(store, said)
            )  # its own error is enough for a rank

    def _ring(self, store: Any, said: dict[str, Any]) -> None:
        error = RemoteReplayFailed(
            f"a replay failed on rank {said['rank']}: {said['error']}: {said['message']}",
            where=said["region"],
            why="the other ranks would wait in their next collective for one that does not come",
            fix=f"the log of rank {said['rank']} has the whole error",
        )
        print(f"distckpt: rank {self._channel.world.rank}: {error.what}", file=sys.stderr, flush=True)
        rung = [channel.interrupt(store, Verdict.of(error)) for channel in list(self._channels)]
        if any(rung):
            return
        raise_in(self._thread_id, _arriving(error, self._landed))
        threading.Thread(target=_torch_dist.abort_groups, daemon=True).start()  # NCCL's may take its time
        if not self._landed.wait(self.grace) and not self._stopped.is_set():
            print(
                f"{error}\n  (a collective still waits: exit code {EXIT_CODE})", file=sys.stderr, flush=True
            )
            os._exit(EXIT_CODE)


def _arriving(error: RemoteReplayFailed, landed: threading.Event) -> type[RemoteReplayFailed]:
    """A class that the interpreter can call without arguments, in the thread that it is to be raised in."""

    class Arrived(RemoteReplayFailed):
        def __init__(self) -> None:
            landed.set()
            super().__init__(error.what, error.where, error.why, error.fix)

        def __reduce__(self) -> Any:
            return error.__reduce__()

    Arrived.__name__ = Arrived.__qualname__ = RemoteReplayFailed.__name__
    Arrived.__module__ = RemoteReplayFailed.__module__
    return Arrived


def raise_in(thread_id: int, kind: type[BaseException]) -> bool:
    """Raise ``kind()`` in another thread at its next bytecode. False: the thread has ended."""
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    return set_exception(ctypes.c_ulong(thread_id), ctypes.py_object(kind)) == 1
