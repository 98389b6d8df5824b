"""Meeting: every rank says one small thing, one of them compares, and all get the same verdict.

Note [Meeting]
    Everything goes through the rendezvous store, never through the accelerator. A rank writes its message and counts
    itself in; whoever comes last has every message there already, so it reads them in one request, compares them, and
    writes the verdict that the others wait for. Nobody is in charge beforehand, so nobody's death leaves the others
    without a judge. When the timeout passes first, one of those waiting takes the judge's place (a counter decides who)
    and its verdict is the list of ranks that are missing. A verdict may ask a few ranks for their long text and
    be followed by a final one.

    Requests per rank, whatever the world's size and whatever was compared: set, add, wait, get, delete, add. The judge
    has four more and reads N messages; the last to leave deletes what is left, so that nothing stays in the store.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from distckpt_backends.errors import DistckptError

from distckpt import _torch_dist
from distckpt.ranks.errors import NoStore, RanksMissing, RemoteReplayFailed, by_code
from distckpt.ranks.world import World

GRACE = 5.0  # seconds beyond its own timeout that a rank waits for the verdict of the rank that judges
TEXTS = (
    10.0  # seconds that the judge waits for long texts; a rank that dies meanwhile is left out of the diff
)

# Per (namespace, rank), as ranks may be threads of one process. A meeting is held by all ranks or by none, so the
# numbers agree however many coordinators a rank makes.
_numbers: dict[tuple[str, int], itertools.count[int]] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all ranks get: an error to raise (None: agreed), warnings; or ``ask``, ranks whose long text is needed."""

    error: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    ask: tuple[int, ...] = ()

    @staticmethod
    def of(error: DistckptError) -> Verdict:
        """A verdict that raises ``error`` on every rank."""
        parts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        return Verdict({"code": error.code, **parts})

    def raise_error(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            parts = dict(self.error)
            raise by_code(parts.pop("code"))(**parts)


Judge = Callable[[dict[int, bytes], dict[int, bytes]], Verdict]


class Channel:
    """One rank's place at the store, under a namespace of its own for this job and this elastic restart.

    Args:
        store: a ``torch.distributed.Store`` that every rank reaches; None for a world of one.
    """

    def __init__(self, store: Any, world: World) -> None:
        self.store = store
        self.world = world
        self.namespace = f"distckpt/{world.run}/{world.round}"
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._interrupted = threading.Event()

    def meet(
        self,
        topic: str,
        message: bytes,
        judge: Judge,
        *,
        timeout: float,
        ranks: Sequence[int] | None = None,
        text: Callable[[], bytes] = bytes,
        subject: str | None = None,
    ) -> Verdict:
        """Say ``message`` to the other ``ranks`` (all) and return the verdict on what everybody said.

        Args:
            topic: what is met about; meetings on one topic are numbered, equally on every rank.
            judge: compares messages by rank, on one of the ranks. If its verdict asks for texts it is called again
                with these as its second argument.
            timeout: seconds until the ranks that have not come are given up.
            text: makes the long form of ``message``, which only some ranks are asked for, and only on disagreement.
            subject: what the ranks came for, in the words of an error; the topic and its number without it.

        Raises:
            RanksMissing: not everybody came in time.
            NoStore: the store does not answer.
        """
        ranks = range(self.world.size) if ranks is None else ranks
        if len(ranks) == 1:
            verdict = judge({self.world.rank: message}, {})
            return judge({self.world.rank: message}, {self.world.rank: text()}) if verdict.ask else verdict
        key = f"{self.namespace}/{topic}/{self.number(topic)}"
        try:
            return _Meeting(self, key, ranks, timeout, subject).hold(message, judge, text)
        except dist.DistError as error:
            raise NoStore(
                "the rendezvous store does not answer",
                where=f"rank {self.world.rank}, meeting {key}",
                why=str(error).splitlines()[0],
                fix="the process that serves it is gone, torchrun's agent or rank 0: see its log first",
            ) from error

    def number(self, topic: str) -> int:
        """How often this has been asked about ``topic`` by this rank, in this job and restart."""
        return next(_numbers.setdefault((f"{self.namespace}/{topic}", self.world.rank), itertools.count()))

    def wait(self, key: str, seconds: float) -> bytes | None:
        """The value of ``key`` once it is there, or None after ``seconds``."""
        with self._lock:
            self._waiting.add(key)
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError as error:  # each kind of store has its own class for this
            if isinstance(error, dist.DistNetworkError) or "timeout" not in str(error).lower():
                raise
            return None
        finally:
            with self._lock:
                self._waiting.discard(key)
        return self.store.get(key)

    def interrupt(self, store: Any, verdict: Verdict, seconds: float = 5.0) -> bool:
        """From another thread, through a connection of its own: end what this rank waits for with ``verdict``.

        Returns:
            Whether the rank has read such a verdict, this one or another's.
        """
        with self._lock:
            keys = list(self._waiting)
        for key in keys:
            store.set(key, _pack(verdict))
        # Another rank may have ended the meeting that both wait in.
        return self._interrupted.wait(seconds if keys else 0)


class _Meeting:
    def __init__(
        self, channel: Channel, key: str, ranks: Sequence[int], timeout: float, subject: str | None
    ) -> None:
        self.channel = channel
        self.store = channel.store
        self.rank = channel.world.rank
        self.key = key
        self.ranks = ranks
        self.timeout = timeout
        topic, number = key.rsplit("/", 2)[-2:]
        self.subject = subject or f"{topic} {int(number) + 1}"

    def hold(self, message: bytes, judge: Judge, text: Callable[[], bytes]) -> Verdict:
        self.store.set(f"{self.key}/say/{self.rank}", message)
        judging = self.store.add(f"{self.key}/here", 1) == len(self.ranks) and self._claim()
        messages: dict[int, bytes] = {}
        if judging:
            messages = self._read("say", self.ranks)
            self._publish("verdict", lambda: judge(messages, {}))
        verdict = self._wait("verdict", self.timeout)
        if verdict.ask:
            if self.rank in verdict.ask:
                self.store.set(f"{self.key}/text/{self.rank}", text())
            if judging:
                texts = self._texts(verdict.ask)
                self._publish("final", lambda: judge(messages, texts))
            asked, verdict = verdict.ask, self._wait("final", self.timeout + TEXTS)
            self._leave(asked)
        elif not (verdict.error and verdict.error["code"] == RanksMissing.code):
            self._leave(())
        return verdict

    def _claim(self) -> bool:
        """Whether this rank is the one to write the verdict: once per meeting."""
        return self.store.add(f"{self.key}/claim", 1) == 1

    def _read(self, kind: str, ranks: Sequence[int]) -> dict[int, bytes]:
        keys = [f"{self.key}/{kind}/{rank}" for rank in ranks]
        return dict(zip(ranks, self.store.multi_get(keys), strict=True))

    def _texts(self, asked: Sequence[int]) -> dict[int, bytes]:
        end = time.monotonic() + TEXTS
        found: dict[int, bytes] = {}
        for rank in asked:
            text = self.channel.wait(f"{self.key}/text/{rank}", max(0.01, end - time.monotonic()))
            if text is not None:
                found[rank] = text
        return found

    def _publish(self, name: str, judge: Callable[[], Verdict]) -> None:
        try:
            verdict = judge()
        except Exception as error:  # a fault of ours must not leave the others waiting
            self.store.set(
                f"{self.key}/{name}", _pack(Verdict.of(DistckptError(f"comparing failed: {error!r}")))
            )
            raise
        self.store.set(f"{self.key}/{name}", _pack(verdict))

    def _wait(self, name: str, seconds: float) -> Verdict:
        found = self.channel.wait(f"{self.key}/{name}", seconds)
        if found is None and self._claim():
            self._publish(name, lambda: Verdict.of(self._missing()))
        if found is None:
            found = self.channel.wait(f"{self.key}/{name}", GRACE)
        if found is None:
            raise self._missing()
        verdict = _unpack(found)
        if verdict.error and verdict.error["code"] == RemoteReplayFailed.code:
            self.channel._interrupted.set()
            verdict.raise_error()
        return verdict

    def _missing(self) -> RanksMissing:
        ranks = [r for r in self.ranks if not self.store.check([f"{self.key}/say/{r}"])]
        names = f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}" if ranks else "the rank that compares"
        world = self.channel.world
        agents = "; after a restart with several torchrun agents: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each of them"
        agents = agents if world.launcher == "torchrun" and not world.fresh_store else ""
        return RanksMissing(
            f"{names} did not come to {self.subject} within {self.timeout:g} s",
            where=f"{len(self.ranks) - len(ranks)} of {len(self.ranks)} ranks are waiting there",
            why="a rank that is missing has died, is late, or takes another way through the program",
            fix="the log of a missing rank says which; a slow start needs a longer Coordinator(timeout=...)"
            + agents,
        )

    def _leave(self, asked: Sequence[int]) -> None:
        """Take this rank's keys away; the last one takes the rest."""
        if self.rank in asked:
            self.store.delete_key(f"{self.key}/text/{self.rank}")
        self.store.delete_key(f"{self.key}/say/{self.rank}")
        if self.store.add(f"{self.key}/left", 1) == len(self.ranks):
            for name in ("here", "claim", "verdict", *(("final",) if asked else ()), "left"):
                self.store.delete_key(f"{self.key}/{name}")


def open_store(world: World) -> Any:
    """The store of the default process group, or the one that the launcher's environment leads to; None when alone.

    Raises:
        NoStore: several ranks, and neither.
    """
    if world.size == 1:
        return None
    store = _torch_dist.default_store()
    if store is None and world.launcher in ("torchrun", "environment"):
        try:
            store = dist.PrefixStore("distckpt", next(dist.rendezvous("env://"))[0])
        except (ValueError, RuntimeError) as error:
            raise _no_store(world, str(error).splitlines()[0]) from error
    if store is None:
        raise _no_store(world, "there is no process group yet, and no MASTER_ADDR to meet at")
    return store


def _no_store(world: World, why: str) -> NoStore:
    return NoStore(
        f"{world.size} ranks have no store to meet through",
        where=f"rank {world.rank}, started by {world.launcher}",
        why=why,
        fix="call torch.distributed.init_process_group first (any backend), or pass Coordinator(store=...)",
    )


def spans(ranks: Sequence[int]) -> str:
    """Ranks as people write them: ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _pack(verdict: Verdict) -> bytes:
    said = {field: value for field, value in vars(verdict).items() if value}
    return json.dumps(said, separators=(",", ":")).encode()


def _unpack(data: bytes) -> Verdict:
    said = json.loads(data)
    return Verdict(said.get("error"), tuple(said.get("warnings", ())), tuple(said.get("ask", ())))
