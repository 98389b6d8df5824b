"""Named random streams, seeded by this rank's place in the mesh, and which of them the default generators hold.

Note [What a name promises]
    A stream differs between two ranks exactly when they stand at different coordinates along one of its mesh dims:

    ================== ======================== ================ ===========================================
    stream             differs over             equal over       for values that are
    ================== ======================== ================ ===========================================
    data-parallel      dp, pp                   tp, cp, ep       whole on every rank of a tensor-parallel group
    context-parallel   cp, dp, pp               tp, ep           split along the sequence, whole over tp
    tensor-parallel    tp, cp, dp, pp           ep               split over tp
    expert-parallel    ep, tp, cp, dp, pp                        inside experts
    ================== ======================== ================ ===========================================

    The seed is the first eight bytes of SHA-256 over (seed, name, coordinates): no sums of offsets that meet again
    at another coordinate. The CPU's generator uses the lower half of a seed only; ``check_streams`` finds the rare
    pair of ranks that meets there.

Note [One set of generators, many streams]
    Every operator draws from the default generators, which belong to the whole process. A named stream is a state
    of them that is kept aside. Entering a stream puts the present states aside under the name of the stream they
    belong to and writes those of the entered one; leaving does the reverse. So exactly one stream is in the
    generators at any time, whatever thread draws, and all others are parked.

Note [Regions]
    What is parked, and under which blocks, is one object that is replaced and never changed. It is a stream of the
    engine's: a region keeps a reference to it, and its replay puts it back for as long as it runs. The generators
    themselves are stashed by the engine as ever. Together that is the state of every stream as it was, whether the
    region was recorded inside a block, enters one, or both, and also when a replay stops inside a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from distckpt_backends import Backend, get, live

from distckpt import _torch_dist
from distckpt._torch import call_without_dynamo, dynamo_callback, graph_task_id, opaque_to_dynamo
from distckpt.engine import streams as engine_streams
from distckpt.engine.region import is_recomputing
from distckpt.engine.rng import Generator
from distckpt.errors import BadStreams, StreamInUse, UnknownStream
from distckpt.ranks.world import group_rank, group_size

DEFAULT = "default"  # the stream that a process has anyway
_CPU = Generator(get("cpu"), torch.device("cpu"))


def generators() -> tuple[Generator, ...]:
    """The default generators of this process: the CPU's and those of every live device."""
    return (_CPU, *(Generator(b, d) for b in live() if b.capabilities.rng for d in b.live_devices()))


@functools.lru_cache(maxsize=256)
def _start(backend: Backend, device: torch.device, seed: int) -> Any:
    held = backend.rng_stash(device)
    try:
        backend.rng_seed(device, seed)
        return backend.rng_stash(device)
    finally:
        backend.rng_restore(device, held)


@dataclasses.dataclass(frozen=True)
class NamedStream:
    """A named stream: its seed, where it comes from, and where it has got to.

    ``coordinates`` are this rank's along the mesh dims over which the stream differs. ``states`` has the devices
    on which something was drawn; on the others the stream stands at its seed.
    """

    name: str
    seed: int
    base: int
    coordinates: tuple[tuple[str, int], ...]
    states: Mapping[torch.device, Any] = dataclasses.field(default_factory=dict)

    def state(self, generator: Generator) -> Any:
        """The stream's state on the device of ``generator``."""
        found = self.states.get(generator.device)
        return _start(generator.backend, generator.device, self.seed) if found is None else found

    def taken_from(self, generators: tuple[Generator, ...]) -> NamedStream:
        """The stream with what the generators hold now; itself when nothing was drawn."""
        new = {g.device: g.get_state() for g in generators if g.moved(self.state(g))}
        return dataclasses.replace(self, states={**self.states, **new}) if new else self


class OpenBlock(NamedTuple):
    """One block under way: its stream, the generators it switched, and the thread that entered it."""

    name: str
    generators: tuple[Generator, ...]
    thread: int


class StreamStates(NamedTuple):
    """The open blocks, outermost first, and every stream. What is said of the one in the generators is out of date."""

    frames: tuple[OpenBlock, ...]
    streams: Mapping[str, NamedStream]

    @property
    def current(self) -> str:
        return self.frames[-1].name if self.frames else DEFAULT


class RngStreamTracker:
    """The one of this process; a stream of the engine's while there are named streams."""

    name = "named streams"

    def __init__(self) -> None:
        self.now = StreamStates((), {})
        self._registration: engine_streams.Registration | None = None

    # What the engine asks of a stream -------------------------------------------------------------------

    def get_state(self) -> StreamStates:
        return self.now

    def set_state(self, state: StreamStates) -> None:
        self.now = state

    lend = get_state
    take_back = set_state

    def moved(self, state: StreamStates) -> bool:
        now = self.now
        return now is not state and not (
            [f.name for f in now.frames] == [f.name for f in state.frames]
            and now.streams.keys() == state.streams.keys()
            and all(_equal(s, state.streams[name]) for name, s in now.streams.items() if name != now.current)
        )

    # Blocks -------------------------------------------------------------------------------------------------

    def enter(self, name: str) -> OpenBlock:
        """Put stream ``name`` into the generators.

        Raises:
            UnknownStream: nobody seeded it.
            StreamInUse: another thread has a block open.
        """
        now = self.now
        entered = now.streams.get(name)
        if entered is None or name == DEFAULT:
            raise UnknownStream(
                f"there is no random stream named {name!r}",
                why=f"seeded here: {', '.join(sorted(self.names())) or 'none'}",
                fix="call dc.rng.seed_streams(mesh, seed=...) first; a stream of your own goes into its streams=",
            )
        self._refuse_other_thread(name)
        outer = now.streams.get(now.current) or NamedStream(DEFAULT, 0, 0, ())
        frame = OpenBlock(name, generators(), threading.get_ident())
        if now.current == DEFAULT:
            held = dataclasses.replace(outer, states={g.device: g.get_state() for g in frame.generators})
        else:
            held = outer.taken_from(frame.generators)
        _write(entered if name != now.current else held, frame.generators)
        self.now = StreamStates((*now.frames, frame), {**now.streams, held.name: held})
        return frame

    def leave(self, frame: OpenBlock) -> None:
        """Undo :meth:`enter`.

        Raises:
            StreamInUse: the block is not the innermost one, or a device came up inside it. In the second case the
                block has been left all the same.
        """
        now = self.now
        if not now.frames or now.frames[-1] is not frame:
            raise StreamInUse(
                f"the block of stream {frame.name!r} was left while {now.current!r} is the innermost one",
                why="blocks end in the reverse order of their beginning, also those of generators and threads",
                fix="use `with` blocks, and do not yield from inside one",
            )
        left = now.streams[frame.name].taken_from(frame.generators)
        known = {**now.streams, frame.name: left}
        outer = StreamStates(now.frames[:-1], known)
        _write(known[outer.current], frame.generators)
        if outer.current == DEFAULT:
            del known[DEFAULT]  # it is in the generators
        self.now = outer
        late = {g.device for g in generators()} - {g.device for g in frame.generators}
        if late:
            raise StreamInUse(
                f"{', '.join(sorted(map(str, late)))} was initialised inside a block of stream {frame.name!r}",
                why="its generator began with the device's own seed and not with the stream's state",
                fix="use the device once before the block, for example torch.zeros(1, device=...)",
            )

    def _refuse_other_thread(self, name: str) -> None:
        frames = self.now.frames
        # A replay, or a backward on autograd's device thread, works for the thread that waits for it.
        apart = bool(frames) and frames[-1].thread != threading.get_ident()
        if apart and graph_task_id() == -1 and not is_recomputing():
            raise StreamInUse(
                f"stream {name!r} was entered while another thread is inside one of {frames[-1].name!r}",
                why="the default generators belong to the whole process, so both would draw from one stream",
                fix="enter streams from one thread, or draw from generators of your own (dc.rng.register)",
            )

    # Seeding and loading --------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The named streams."""
        return [name for name in self.now.streams if name != DEFAULT]

    def put(self, new: Mapping[str, NamedStream]) -> None:
        """Add streams, or replace those of the same name.

        Raises:
            StreamInUse: inside a block.
        """
        self.refuse_inside("seeded or loaded")
        self.now = StreamStates((), {**self.now.streams, **new})
        self._register()

    def drop(self, old: Mapping[str, Any]) -> None:
        """Forget streams.

        Raises:
            StreamInUse: inside a block.
        """
        self.refuse_inside("removed")
        self.now = StreamStates((), {name: s for name, s in self.now.streams.items() if name not in old})
        self._register()

    def refuse_inside(self, what: str) -> None:
        """Raise StreamInUse inside a block."""
        if self.now.frames:
            raise StreamInUse(
                f"random streams cannot be {what} inside a block of stream {self.now.current!r}",
                why="the block would put its own states over them",
                fix="do it outside the `with` block",
            )

    def _register(self) -> None:
        if self.now.streams and self._registration is None:
            self._registration = engine_streams.add(self)
        elif not self.now.streams and self._registration is not None:
            self._registration.remove()
            self._registration = None


def _equal(a: NamedStream, b: NamedStream) -> bool:
    return a is b or (a.seed == b.seed and engine_streams.same(dict(a.states), dict(b.states)))


def _write(stream: NamedStream, generators: tuple[Generator, ...]) -> None:
    """Put a stream into the generators; all of them or, after an error, none."""
    before = [(g, g.get_state()) for g in generators]
    try:
        for g in generators:
            g.set_state(stream.state(g))
    except BaseException:
        for g, state in before:
            g.set_state(state)
        raise


tracker = RngStreamTracker()


STREAMS: dict[str, tuple[str, ...]] = {
    "data-parallel": ("dp", "pp"),
    "context-parallel": ("cp", "dp", "pp"),
    "tensor-parallel": ("tp", "cp", "dp", "pp"),
    "expert-parallel": ("ep", "tp", "cp", "dp", "pp"),
}
"""The streams that exist by default, and the dims over which each differs."""

ALIASES: dict[str, str] = {
    **dict.fromkeys(("data", "ddp", "fsdp", "dp_replicate", "dp_shard", "replicate", "shard"), "dp"),
    **dict.fromkeys(("tensor", "model", "mp", "etp"), "tp"),
    **dict.fromkeys(("pipe", "pipeline", "stage"), "pp"),
    **dict.fromkeys(("expert", "experts"), "ep"),
    **dict.fromkeys(("context", "seq", "sp"), "cp"),
}
"""Other names of mesh dims; several dims may have one meaning."""


class stream(contextlib.AbstractContextManager[None]):
    """Draw from the named stream inside the block: ``with dc.rng.stream("tensor-parallel"): ...``.

    The default generators of the CPU and of every live device stand where the stream stands, and are back where they
    were afterwards, also after an exception. Blocks nest. A region that is recorded in a block or enters one
    replays with the states of its forward and leaves every stream where it was.

    Raises:
        UnknownStream: on entering; nobody seeded a stream of that name (DC450).
        StreamInUse: on entering, while another thread is inside a block; on leaving, when the block is not the
            innermost one or a device was initialised inside it (DC451).
    """

    __slots__ = ("_frames", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._frames: list[OpenBlock] = []

    @opaque_to_dynamo
    def __enter__(self) -> None:
        self._frames.append(_eagerly(tracker.enter, self.name))

    @opaque_to_dynamo
    def __exit__(self, *exc: object) -> None:
        _eagerly(tracker.leave, self._frames.pop())


def _eagerly(function: Any, argument: Any) -> Any:
    # Under torch.compile a block breaks the graph; what it does to generators is not for Dynamo to trace.
    eager = dynamo_callback() is None
    return function(argument) if eager else call_without_dynamo(function, argument)


class Seeded(contextlib.AbstractContextManager["Seeded"]):
    """Handle of seeded streams: ``names``, and ``remove()`` to forget them; also a context manager."""

    def __init__(self, new: Mapping[str, NamedStream]) -> None:
        self.names = tuple(new)

    def remove(self) -> None:
        """Forget the streams. Regions recorded before keep what they stashed. Removing twice is harmless.

        Raises:
            StreamInUse: inside a block (DC451).
        """
        tracker.drop(dict.fromkeys(self.names))
        if not tracker.names():
            _forget_tracker()

    def __exit__(self, *exc: object) -> None:
        self.remove()


def derive(seed: int, name: str, coordinates: Iterable[tuple[str, int]]) -> int:
    """The seed of a stream at a place: an unsigned 63-bit int."""
    text = json.dumps([seed, name, sorted(coordinates)], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_streams(
    mesh: Any,
    seed: int,
    *,
    streams: Mapping[str, Iterable[str]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Seeded:
    """Seed the named streams of this rank by its coordinates in ``mesh``. No communication.

    Call it once the devices are in use. A second call adds streams (an expert mesh, for example), and starts those of
    the same name anew. Where DTensor has a tracker of random states for the device type of the mesh, it is made here:
    left to itself it would overwrite the streams with rank 0's states in its first random operator.

    Args:
        mesh: a ``DeviceMesh`` with named dims; None in a job of one process.
        seed: any int; the same on every rank.
        streams: name of each stream to the dims over which it differs; None takes :data:`STREAMS`.
        aliases: further names of mesh dims, over :data:`ALIASES`: ``{"my_dim": "dp"}``.

    Returns:
        A handle with ``remove()``.

    Raises:
        BadStreams: no mesh for several ranks, a mesh without names or without this rank, a dim whose meaning is
            unknown, a seed that is not an int (DC452). Nothing was seeded.
        StreamInUse: inside a block (DC451).
    """
    if type(seed) is not int:
        raise BadStreams(f"the seed of random streams is an int, not a {type(seed).__name__}")
    table = _table(streams)
    if aliases is not None and not (isinstance(aliases, Mapping) and _names(aliases, aliases.values())):
        raise BadStreams(
            "aliases= is a table of mesh dims and what they mean", fix='for example aliases={"my_dim": "dp"}'
        )
    meanings = {**ALIASES, **(aliases or {})}
    place = _coordinates(mesh, meanings, {dim for dims in table.values() for dim in dims})
    new: dict[str, NamedStream] = {}
    for name, dims in table.items():
        differs = {meanings.get(dim, dim) for dim in dims}
        at = tuple(sorted((dim, i) for dim, meaning, i in place if meaning in differs or dim in dims))
        new[name] = NamedStream(name, derive(seed, name, at), seed, at)
    tracker.refuse_inside("seeded")
    if mesh is not None:
        _stash_tracker(mesh)
    tracker.put(new)
    return Seeded(new)


def _table(streams: Any) -> dict[str, tuple[str, ...]]:
    if streams is None:
        return dict(STREAMS)
    known = isinstance(streams, Mapping) and DEFAULT not in streams and _names(streams)
    lists = known and all(
        isinstance(dims, Iterable) and not isinstance(dims, str) for dims in streams.values()
    )
    table = {name: tuple(dims) for name, dims in streams.items()} if lists else {}
    if not lists or not _names(*table.values()):
        raise BadStreams(
            f"streams= is a table of names (not {DEFAULT!r}) and tuples of mesh dims",
            fix='for example streams={"router": ("dp", "ep")}',
        )
    return table


def _names(*given: Iterable[Any]) -> bool:
    return all(isinstance(name, str) for names in given for name in names)


def _coordinates(mesh: Any, meanings: Mapping[str, str], wanted: set[str]) -> list[tuple[str, str, int]]:
    """Name, meaning and this rank's coordinate of every dim of the mesh."""
    if mesh is None:
        if group_size() > 1:
            raise BadStreams(
                f"random streams need a mesh: this job has {group_size()} ranks",
                why="without coordinates every rank would get the same streams",
                fix='mesh = init_device_mesh(device_type, (dp, tp), mesh_dim_names=("dp", "tp"))',
            )
        return []
    names = getattr(mesh, "mesh_dim_names", None)
    if names is None:
        raise BadStreams(
            f"random streams need a DeviceMesh whose dims have names, not {mesh!r}",
            why="the names say over which dims a stream differs",
            fix='pass mesh_dim_names=("dp", "tp"), for example, when you make the mesh',
        )
    at = mesh.get_coordinate()
    if at is None:
        raise BadStreams(
            f"rank {group_rank()} is not in the mesh", fix="seed its streams with a mesh that it is in"
        )
    known = set(ALIASES.values()) | wanted
    strange = [name for name in names if meanings.get(name, name) not in known and name not in known]
    if strange:
        raise BadStreams(
            f"mesh dim {', '.join(map(repr, strange))} has no meaning for random streams",
            why=f"known: {', '.join(sorted(known))}, and the names in distckpt.ranks.rng_streams.ALIASES",
            fix=f'say what it is: aliases={{{strange[0]!r}: "dp"}}, or name it in streams=',
        )
    return [(name, meanings.get(name, name), int(i)) for name, i in zip(names, at, strict=True)]


_tracker: engine_streams.Registration | None = None


def _stash_tracker(mesh: Any) -> None:
    global _tracker
    if _torch_dist.make_dtensor_tracker(mesh) is not None and _tracker is None:
        _tracker = engine_streams.add(
            engine_streams.Stream(
                "DTensor tracker",
                lambda: _torch_dist.tracker_state(_torch_dist.dtensor_tracker()),
                lambda state: _torch_dist.set_tracker_state(_torch_dist.dtensor_tracker(), state),
            )
        )


def _forget_tracker() -> None:
    global _tracker
    if _tracker is not None:
        _tracker.remove()
        _tracker = None
