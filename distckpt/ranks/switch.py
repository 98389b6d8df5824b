"""Switch: which random stream the default generators of this process hold.

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

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from distckpt_backends import Backend, get, live

from distckpt._torch import graph_task_id
from distckpt.engine import streams
from distckpt.engine.region import is_recomputing
from distckpt.engine.rng import Generator
from distckpt.errors import StreamInUse, UnknownStream

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
class Stream:
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

    def taken_from(self, generators: tuple[Generator, ...]) -> Stream:
        """The stream with what the generators hold now; itself when nothing was drawn."""
        new = {g.device: g.get_state() for g in generators if g.moved(self.state(g))}
        return dataclasses.replace(self, states={**self.states, **new}) if new else self


class Frame(NamedTuple):
    """One block under way: its stream, the generators it switched, and the thread that entered it."""

    name: str
    generators: tuple[Generator, ...]
    thread: int


class Now(NamedTuple):
    """The open blocks, outermost first, and every stream. What is said of the one in the generators is out of date."""

    frames: tuple[Frame, ...]
    streams: Mapping[str, Stream]

    @property
    def current(self) -> str:
        return self.frames[-1].name if self.frames else DEFAULT


class Switch:
    """The one of this process; a stream of the engine's while there are named streams."""

    name = "named streams"

    def __init__(self) -> None:
        self.now = Now((), {})
        self._registration: streams.Registration | None = None

    # What the engine asks of a stream -------------------------------------------------------------------

    def get_state(self) -> Now:
        return self.now

    def set_state(self, state: Now) -> None:
        self.now = state

    lend = get_state
    take_back = set_state

    def moved(self, state: Now) -> bool:
        now = self.now
        return now is not state and not (
            [f.name for f in now.frames] == [f.name for f in state.frames]
            and now.streams.keys() == state.streams.keys()
            and all(_equal(s, state.streams[name]) for name, s in now.streams.items() if name != now.current)
        )

    # Blocks -------------------------------------------------------------------------------------------------

    def enter(self, name: str) -> Frame:
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
        outer = now.streams.get(now.current) or Stream(DEFAULT, 0, 0, ())
        frame = Frame(name, generators(), threading.get_ident())
        if now.current == DEFAULT:
            held = dataclasses.replace(outer, states={g.device: g.get_state() for g in frame.generators})
        else:
            held = outer.taken_from(frame.generators)
        _write(entered if name != now.current else held, frame.generators)
        self.now = Now((*now.frames, frame), {**now.streams, held.name: held})
        return frame

    def leave(self, frame: Frame) -> None:
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
        outer = Now(now.frames[:-1], known)
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

    def put(self, new: Mapping[str, Stream]) -> None:
        """Add streams, or replace those of the same name.

        Raises:
            StreamInUse: inside a block.
        """
        self.refuse_inside("seeded or loaded")
        self.now = Now((), {**self.now.streams, **new})
        self._register()

    def drop(self, old: Mapping[str, Any]) -> None:
        """Forget streams.

        Raises:
            StreamInUse: inside a block.
        """
        self.refuse_inside("removed")
        self.now = Now((), {name: s for name, s in self.now.streams.items() if name not in old})
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
            self._registration = streams.add(self)
        elif not self.now.streams and self._registration is not None:
            self._registration.remove()
            self._registration = None


def _equal(a: Stream, b: Stream) -> bool:
    return a is b or (a.seed == b.seed and streams.same(dict(a.states), dict(b.states)))


def _write(stream: Stream, generators: tuple[Generator, ...]) -> None:
    """Put a stream into the generators; all of them or, after an error, none."""
    before = [(g, g.get_state()) for g in generators]
    try:
        for g in generators:
            g.set_state(stream.state(g))
    except BaseException:
        for g, state in before:
            g.set_state(state)
        raise


switch = Switch()
