"""Store: where ranks meet. Every rank says one small thing, one of them compares, and all get the same verdict; or all
get what each has said (:func:`gather`, which goes through the process group).

Note [Meeting]
    Everything goes through the rendezvous store, never through the accelerator. A rank counts itself in and writes its
    message, with its place in the count. Whoever is counted last writes its rank down as the judge's, reads all
    messages in one request, compares them, and writes the verdict that the others wait for. Nobody is in charge
    beforehand, so nobody's death leaves the others without a judge. A verdict may ask a few ranks for their long text
    and be followed by a final one.

    Requests per rank, whatever the world's size and whatever was compared: add, set, wait, get, delete, add. The
    judge has four more and reads N messages; the last to leave deletes what is left, so that nothing stays in the
    store.

Note [Who is missing]
    A rank may be killed or stopped between any two requests. Then the others get the same error at the end of the
    timeout, and it names that rank:

    - before its message is written: one of those waiting becomes the judge (``compare_set`` decides who), and its
      verdict is the list of the ranks without a message;
    - while it judges, or before it has begun: its rank is in the store, or its place in the count says it. One of those
      waiting takes its place and compares again. A disagreement is told, and that this rank is gone; without one the
      verdict is that it is missing;
    - when it is asked for its text: the judge goes on without it after half of the grace, and says so.

    The first verdict counts, so a judge that was stopped and wakes up reads that of its successor. Where a rank is
    missing, keys are left in the store for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from distckpt_backends.errors import DistckptError

from distckpt import _torch_dist
from distckpt.errors import NoStore, RankFailed, RanksMissing, RemoteReplayFailed, by_code
from distckpt.ranks.world import World, group_size

GRACE = 10.0  # seconds, or half of the timeout, that a rank which judges has, before another takes its place

# Per (namespace, rank), as ranks may be threads of one process. A meeting is held by all ranks or by none, so the
# numbers agree however many coordinators a rank makes.
_numbers: dict[tuple[str, int], itertools.count[int]] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all ranks get: an error to raise (None: agreed), warnings; or ``ask``, ranks whose long text is needed.

    ``missing`` are ranks that were there and answer no more.
    """

    error: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    ask: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    cause: BaseException | None = None  # on the rank where it happened; it does not travel

    @staticmethod
    def of(error: DistckptError, missing: Sequence[int] = ()) -> Verdict:
        """A verdict that raises ``error`` on every rank."""
        parts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        return Verdict({"code": error.code, **parts}, missing=tuple(missing))

    def raise_error(self, cause: BaseException | None = None) -> None:
        """Raise the error, if there is one; ``cause`` is what happened on this rank."""
        if self.error is not None:
            parts = dict(self.error)
            raise by_code(parts.pop("code"))(**parts) from (cause or self.cause)


Judge = Callable[[dict[int, bytes], "dict[int, bytes] | None"], Verdict]


def failed(error: Exception) -> DistckptError:
    """``error`` as all ranks can raise it: itself if it has a code, else :class:`RankFailed`, which quotes it."""
    if isinstance(error, DistckptError):
        return error
    return RankFailed(
        f"a rank failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(
            ": "
        ),
        why="the error is none of distckpt's, so only the rank that it happened on knows more",
        fix="the log of that rank has the whole error",
    )


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
            judge: compares messages by rank, on one of the ranks. Its second argument is None. If its verdict asks for
                texts it is called again with those that came.
            timeout: seconds until the ranks that have not come are given up.
            text: makes the long form of ``message``, which only some ranks are asked for, and only on disagreement.
            subject: what the ranks came for, in the words of an error; the topic and its number without it.

        Raises:
            RanksMissing: not everybody came in time.
            NoStore: the store does not answer. If rank 0 serves it, that is RanksMissing too.
        """
        ranks = range(self.world.size) if ranks is None else ranks
        if len(ranks) == 1:
            verdict = judge({self.world.rank: message}, None)
            return judge({self.world.rank: message}, {self.world.rank: text()}) if verdict.ask else verdict
        key = f"{self.namespace}/{topic}/{self.number(topic)}"
        meeting = _Meeting(self, key, ranks, timeout, subject, judge)
        try:
            return meeting.hold(message, text)
        except dist.DistError as error:
            if isinstance(error, dist.DistNetworkError) and self.world.rank != 0 and not served_by_agent():
                raise _server_left(meeting.subject, str(error).splitlines()[0]) from error
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
        """The verdict under ``key`` once it is there, or None after ``seconds``. :meth:`interrupt` ends it."""
        with self._lock:
            self._waiting.add(key)
        try:
            return self.store.get(key) if self.there([key], seconds) else None
        finally:
            with self._lock:
                self._waiting.discard(key)

    def there(self, keys: list[str], seconds: float) -> bool:
        """Whether all of ``keys`` are there within ``seconds``."""
        try:
            self.store.wait(keys, timedelta(seconds=max(0.01, seconds)))
        except RuntimeError as error:  # each kind of store has its own class for this
            if isinstance(error, dist.DistNetworkError) or "timeout" not in str(error).lower():
                raise
            return False
        return True

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
        self,
        channel: Channel,
        key: str,
        ranks: Sequence[int],
        timeout: float,
        subject: str | None,
        judge: Judge,
    ) -> None:
        self.channel = channel
        self.store = channel.store
        self.rank = channel.world.rank
        self.key = key
        self.ranks = ranks
        self.timeout = timeout
        self.grace = min(GRACE, timeout / 2)
        self.judge = judge
        self.judging = False
        self.cause: Exception | None = None
        topic, number = key.rsplit("/", 2)[-2:]
        self.subject = subject or f"{topic} {int(number) + 1}"

    def hold(self, message: bytes, text: Callable[[], bytes]) -> Verdict:
        place = self.store.add(f"{self.key}/here", 1)
        self.store.set(f"{self.key}/say/{self.rank}", b"%d\n%b" % (place, message))
        if place == len(self.ranks) and self._replace("") == str(self.rank):
            self._publish("verdict", self._compare((), self.grace))
        verdict = self._wait("verdict", self.timeout)
        asked = verdict.ask
        if asked:
            if self.rank in asked:
                self.store.set(f"{self.key}/text/{self.rank}", text())
            if self.judging:
                self._publish("final", self._conclude(asked, verdict.missing, self.grace / 2))
            verdict = self._wait("final", 2 * self.grace, asked, verdict.missing)
        if not verdict.missing:
            self._leave(asked)
        return dataclasses.replace(verdict, cause=self.cause)

    def _replace(self, judge: str) -> str:
        """Become the judge if ``judge`` (nobody: empty) is it; who is it then."""
        found = self.store.compare_set(f"{self.key}/judge", judge, str(self.rank)).decode()
        self.judging = found == str(self.rank)
        return found

    def _wait(
        self, name: str, seconds: float, asked: Sequence[int] = (), gone: Sequence[int] = ()
    ) -> Verdict:
        """The verdict called ``name``. Whoever has waited for it too long without an answer writes it itself."""
        found = self.channel.wait(f"{self.key}/{name}", seconds - self.grace)
        suspect = ""
        if found is None and self.store.check([f"{self.key}/judge"]):
            suspect = self.store.get(f"{self.key}/judge").decode()
        while found is None:
            found = self.channel.wait(f"{self.key}/{name}", self.grace)
            if found is None:
                before, suspect = suspect, self._replace(suspect)
                if self.judging:
                    missing = sorted({*gone, *([int(before)] if before else [])} - {self.rank})
                    verdict = self._conclude(asked, missing) if name == "final" else self._compare(missing)
                    self._publish(name, verdict)
        verdict = _unpack(found)
        if verdict.error and verdict.error["code"] == RemoteReplayFailed.code:
            self.channel._interrupted.set()
            verdict.raise_error()
        return verdict

    def _publish(self, name: str, verdict: Verdict) -> None:
        """Write the verdict, unless one is there: that of a rank which took this one's place."""
        self.store.compare_set(f"{self.key}/{name}", "", _pack(verdict))

    def _compare(self, gone: Sequence[int], patience: float = 0) -> Verdict:
        """What the messages come to. ``gone`` were to compare them before this rank, and did not."""
        said = [f"{self.key}/say/{rank}" for rank in self.ranks]
        if not self.channel.there(
            said, patience
        ):  # the last to be counted may be faster than another's message
            absent = [r for r, one in zip(self.ranks, said, strict=True) if not self.store.check([one])]
            return Verdict.of(self._absent(absent), absent)
        messages, last = self._messages()
        if not gone and last != self.rank:
            gone = (last,)  # it did not come to write itself down
        verdict = self._judged(messages, None)
        if verdict.ask:
            return dataclasses.replace(verdict, missing=tuple(gone))
        return self._without(verdict, gone, "comparing what the ranks said")

    def _conclude(self, asked: Sequence[int], gone: Sequence[int], patience: float = 0) -> Verdict:
        """What the messages come to with the long texts of those that still answer."""
        end = time.monotonic() + patience
        texts: dict[int, bytes] = {}
        for rank in asked:
            key = f"{self.key}/text/{rank}"
            if self.channel.there([key], end - time.monotonic()):
                texts[rank] = self.store.get(key)
        silent = [rank for rank in asked if rank not in texts and rank not in gone]
        return self._without(
            self._judged(self._messages()[0], texts), [*gone, *silent], "comparing what the ranks differ in"
        )

    def _messages(self) -> tuple[dict[int, bytes], int]:
        """What every rank said, and which was counted last."""
        values = self.store.multi_get([f"{self.key}/say/{rank}" for rank in self.ranks])
        parts = {rank: bytes(value).split(b"\n", 1) for rank, value in zip(self.ranks, values, strict=True)}
        last = next(rank for rank, (place, _) in parts.items() if int(place) == len(parts))
        return {rank: message for rank, (_, message) in parts.items()}, last

    def _judged(self, messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
        try:
            return self.judge(messages, texts)
        except Exception as error:  # a fault of ours must not leave the others waiting
            self.cause = error
            told = failed(error)
            return Verdict.of(
                RankFailed(f"comparing failed: {told.what}", f"rank {self.rank}", told.why, told.fix)
            )

    def _without(self, verdict: Verdict, gone: Sequence[int], where: str) -> Verdict:
        """``verdict``, and that ``gone`` answer no more."""
        if not gone:
            return verdict
        named = f"rank{'s' * (len(gone) > 1)} {spans(gone)} came to {self.subject} and stopped answering"
        if verdict.error is None:
            return Verdict.of(self._missing(f"{named} within {self.timeout:g} s", where), gone)
        lines = [verdict.error["where"], named]
        error = {**verdict.error, "where": "\n         ".join(filter(None, lines))}
        return dataclasses.replace(verdict, error=error, missing=tuple(gone))

    def _absent(self, ranks: Sequence[int]) -> RanksMissing:
        named = f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"
        return self._missing(
            f"{named} did not come to {self.subject} within {self.timeout:g} s",
            f"{len(self.ranks) - len(ranks)} of {len(self.ranks)} ranks are waiting there",
        )

    def _missing(self, what: str, where: str) -> RanksMissing:
        world = self.channel.world
        agents = "; after a restart with several torchrun agents: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each of them"
        agents = agents if world.launcher == "torchrun" and not world.fresh_store else ""
        return RanksMissing(
            what,
            where=where,
            why="a rank that is missing has died, was stopped, is late, or takes another way through the program",
            fix="the log of a missing rank says which; a slow start needs a longer Coordinator(timeout=...)"
            + agents,
        )

    def _leave(self, asked: Sequence[int]) -> None:
        """Take this rank's keys away; the last one takes the rest."""
        if self.rank in asked:
            self.store.delete_key(f"{self.key}/text/{self.rank}")
        self.store.delete_key(f"{self.key}/say/{self.rank}")
        if self.store.add(f"{self.key}/left", 1) == len(self.ranks):
            for name in ("here", "judge", "verdict", *(("final",) if asked else ()), "left"):
                self.store.delete_key(f"{self.key}/{name}")


def served_by_agent() -> bool:
    """Whether torchrun's agent serves the store of this job, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(world: World, timeout: float) -> Any:
    """The store of the default process group, or the one that the launcher's environment leads to; None when alone.

    Raises:
        NoStore: several ranks, and neither.
        RanksMissing: rank 0, which is to serve it, did not come within ``timeout`` seconds.
    """
    if world.size == 1:
        return None
    store = _torch_dist.default_store()
    if store is not None:
        return store
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world.launcher not in ("torchrun", "environment") or not host or not port:
        raise _no_store(world, "there is no process group yet, and no MASTER_ADDR and MASTER_PORT to meet at")
    serves = world.rank == 0 and not served_by_agent()
    try:
        # A process group that is made later shares the server. Ranks that do not come are for the meeting to name.
        found = dist.TCPStore(
            host,
            int(port),
            world.size,
            serves,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        if world.rank == 0 or served_by_agent() or not isinstance(error, dist.DistError):
            raise _no_store(world, line) from error
        raise _server_left(f"serve the store within {timeout:g} s", line) from error
    return dist.PrefixStore("distckpt", found)


def _server_left(subject: str, why: str) -> RanksMissing:
    return RanksMissing(
        f"rank 0, or what serves the store in its place, has not come or has left: {subject}",
        where="the other ranks waited for this one, if they came before it, and gave it up after the timeout",
        why=why,
        fix="the log of rank 0 says why it ended; a slow start needs a longer Coordinator(timeout=...)",
    )


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


def named_ranks(members: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    members = list(members)
    return f"rank{'s' * (len(members) > 1)} {spans(members)}"


def _pack(verdict: Verdict) -> bytes:
    said = {field: value for field, value in vars(verdict).items() if value and field != "cause"}
    return json.dumps(said, separators=(",", ":")).encode()


def _unpack(data: bytes) -> Verdict:
    said = json.loads(data)
    return Verdict(
        said.get("error"),
        tuple(said.get("warnings", ())),
        tuple(said.get("ask", ())),
        tuple(said.get("missing", ())),
    )


_group: tuple[Any, Any] | None = None  # the default group it was made for, and the control group


def _control_group() -> Any:
    """A group that reaches every rank without the accelerator: the default one where it is gloo, else one beside it."""
    global _group
    default = dist.group.WORLD
    if _group is None or _group[0] is not default:
        gloo = dist.get_backend(default) == "gloo"
        _group = (default, default if gloo else dist.new_group(backend="gloo"))
    return _group[1]


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. A collective: every rank of the job calls it. Picklable values only."""
    if group_size() == 1:
        return [value]
    found: list[Any] = [None] * group_size()
    dist.all_gather_object(found, value, group=_control_group())
    return found
