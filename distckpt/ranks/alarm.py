"""Alarm: a replay that failed on one rank ends the others with an error that names it.

Note [Alarm]
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
import json
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from distckpt import _torch_dist
from distckpt.engine.events import on_failed_replay
from distckpt.errors import RemoteReplayFailed
from distckpt.ranks.store import Channel, Verdict

EXIT_CODE = 86
_EVERY = 1.0  # seconds between two looks
_LOOKS = 1000  # per second, over all ranks, at most
# Per second, over all ranks, at most. The server looks up the name of whoever connects, and torch's is blocked
# meanwhile: of 64 at once, or of 200 a second, some look-ups took 5 s here, and of 20 a second none.
_CONNECTIONS = 20

_lock = threading.Lock()
_running: dict[tuple[str, int], Alarm] = {}  # by job and rank, as ranks may be threads of one process


def start(channel: Channel) -> Alarm:
    """The alarm of this rank, shared by all coordinators of the process. Each calls :meth:`Alarm.stop` once."""
    with _lock:
        key = (channel.namespace, channel.world.rank)
        alarm = _running.get(key)
        if alarm is not None and not alarm.watches():
            alarm._end()
            alarm = None
        if alarm is None:
            alarm = _running[key] = Alarm(channel)
        alarm.serve(channel)
        return alarm


class Alarm:
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
