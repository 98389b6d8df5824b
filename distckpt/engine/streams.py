"""Streams: random streams that the user owns (``dc.rng``), and whose turn it is to move one.

Note [Turns]
    A replay that draws rewinds generators that the whole process shares, and puts them back. Two at once would draw
    each other's numbers, so a replay takes a turn with every generator that it moves, and others wait for those. A
    replay that moves none takes none. The same goes for modules whose buffers or parameters a replay exchanges. It asks
    for all of it at once, so that two replays do not wait for each other. A turn belongs to a replay and not to its
    thread: a backward started inside it may replay regions on other threads (autograd changes threads for other
    devices, and where gradients are nested more than 60 deep), and they take their turns within that one. Autograd
    carries the turn there, in its thread state.

    Who waits for a turn may hold the lock of a region. So who has a turn never waits for a region: when another thread
    is replaying that one, it replays it as well, and both compute the same values.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from distckpt_backends.state import memcmp

from distckpt._torch import tls_get, tls_set, without_dispatch_modes
from distckpt.errors import StreamError

_KEY = "distckpt.turn"
_changed = threading.Condition()

owners: dict[str, Turn] = {}
"""Whose turn it is, by the name of the generator or module; empty when no replay moves any."""


class Turn:
    """One replay's turn with some generators and modules."""

    __slots__ = ("before", "outer", "over")

    def __init__(self, names: Iterable[str]) -> None:
        """Wait until nobody else has a turn with one of these."""
        self.over = False
        self.outer = current()
        with _changed:
            _changed.wait_for(lambda: all(self._inside(owners.get(name)) for name in names))
            self.before = {name: owners.get(name) for name in names}
            owners.update(dict.fromkeys(names, self))
        tls_set(_KEY, self)

    def _inside(self, owner: Turn | None) -> bool:
        turn: Turn | None = self
        while owner is not None and turn is not None and turn is not owner:
            turn = turn.outer
        return turn is not None

    def end(self) -> None:
        """Let the next one have its turn. On the thread that began it."""
        self.over = True
        with _changed:
            for name, owner in self.before.items():
                if owner is None:
                    owners.pop(name, None)
                else:
                    owners[name] = owner
            _changed.notify_all()
        tls_set(_KEY, self.outer)


def current() -> Turn | None:
    """The turn that this thread, or the backward that it works for, is inside of."""
    turn: Turn | None = tls_get(_KEY)
    return None if turn is None or turn.over else turn


@contextlib.contextmanager
def _if_free(lock: Any):
    free = lock.acquire(blocking=False)
    try:
        yield
    finally:
        if free:
            lock.release()


def waiting_for(lock: Any) -> contextlib.AbstractContextManager[Any]:
    """``lock`` of a region; without waiting for it inside a turn."""
    return lock if not owners or current() is None else _if_free(lock)


def _forked() -> None:
    global _changed
    _changed = threading.Condition()
    owners.clear()  # the other replays stayed in the parent


os.register_at_fork(after_in_child=_forked)


class Stream:
    """A named source of randomness with a state that can be read, put back and compared."""

    __slots__ = ("get_state", "name", "set_state")

    def __init__(self, name: str, get_state: Callable[[], Any], set_state: Callable[[Any], Any]) -> None:
        self.name = name
        self.get_state = get_state
        self.set_state = set_state

    def lend(self) -> Any:
        """The state before a replay sets another."""
        return self.get_state()

    def take_back(self, state: Any) -> None:
        """Put back what :meth:`lend` gave."""
        self.set_state(state)

    def moved(self, state: Any) -> bool:
        """Whether anything was drawn since ``state`` was read."""
        return not same(self.get_state(), state)


class GeneratorStream(Stream):
    """A ``torch.Generator`` as a stream."""

    __slots__ = ("generator",)

    def __init__(self, name: str, generator: torch.Generator) -> None:
        super().__init__(name, generator.get_state, generator.set_state)
        self.generator = generator


def unregistered(generators: Iterable[torch.Generator]) -> list[Stream]:
    """A stream for each of ``generators``, once, that no region stashes by itself."""
    known = {id(s.generator) for s in _streams if type(s) is GeneratorStream}
    return [
        GeneratorStream(f"the torch.Generator at {i:#x}", g)
        for i, g in {id(g): g for g in generators}.items()
        if i not in known and g is not torch.default_generator
    ]


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and _same_tensor(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if hasattr(a, "tobytes"):  # numpy arrays, without importing numpy
        return hasattr(b, "tobytes") and a.tobytes() == b.tobytes()
    return bool(a == b)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Not torch.equal() for what a generator gives: that is an operator, which the modes of a region would see.
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.device.type == "cpu" and a.is_contiguous() and b.is_contiguous():
        return memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
    with without_dispatch_modes():
        return torch.equal(a, b)


# Replaced, never changed in place: a thread that is recording sees either the old or the new tuple.
_streams: tuple[Any, ...] = ()


def registered() -> tuple[Any, ...]:
    """Every registered stream, in the order of registration."""
    return _streams


class Registration(contextlib.AbstractContextManager["Registration"]):
    """Handle of a registered stream: ``remove()`` it, or use it as a context manager."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def remove(self) -> None:
        """Forget the stream. Regions recorded before keep what they stashed. Removing twice is harmless."""
        global _streams
        _streams = tuple(s for s in _streams if s is not self._stream)

    def __exit__(self, *exc: object) -> None:
        self.remove()


def add(stream: Any) -> Registration:
    """Stash and restore ``stream`` with every region from now on: a :class:`Stream`, or what looks like one.

    Raises:
        StreamError: the name is taken.
    """
    global _streams
    if any(s.name == stream.name for s in _streams):
        raise StreamError(
            f"a random stream named {stream.name!r} is already registered",
            why="two streams with one name cannot be told apart in a stash or across ranks",
            fix="remove() the first registration, or choose another name",
        )
    _streams = (*_streams, stream)
    return Registration(stream)


def register(name: str, generator: torch.Generator) -> Registration:
    """Stash and restore ``generator`` with every region from now on.

    Args:
        name: unique name of the stream.
        generator: any ``torch.Generator``, on any device.

    Returns:
        A handle with ``remove()``; also a context manager.

    Raises:
        StreamError: the name is taken, or ``generator`` is not a generator.
    """
    if not isinstance(generator, torch.Generator):
        raise StreamError(
            f"stream {name!r} is a {type(generator).__name__}, not a torch.Generator",
            fix="for another kind of source use rng.register_source(name, get_state, set_state)",
        )
    return add(GeneratorStream(name, generator))


_LIBRARIES = {
    "numpy": ("numpy.random", "get_state", "set_state"),
    "python": ("random", "getstate", "setstate"),
}
"""Foreign sources that :func:`register_source` knows by name: module, and its two functions."""


def _of_library(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if name not in _LIBRARIES:
        raise StreamError(
            f"source {name!r} is none that has functions of its own here",
            why=f"by name alone there are {' and '.join(map(repr, _LIBRARIES))}",
            fix="pass its two functions: rng.register_source(name, get_state, set_state)",
        )
    module, get_state, set_state = _LIBRARIES[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise StreamError(
            f"source {name!r} cannot be imported", why=str(error), fix=f"install {name}"
        ) from error
    return getattr(library, get_state), getattr(library, set_state)


def register_source(
    name: str, get_state: Callable[[], Any] | None = None, set_state: Callable[[Any], Any] | None = None
) -> Registration:
    """Stash and restore a foreign source of randomness with every region from now on.

    ``"numpy"`` and ``"python"`` need no more than the name, and mean the global generators of ``numpy.random`` and
    ``random``. For another source ``get_state()`` must return a value that later draws do not change, and
    ``set_state(value)`` must put it back exactly.

    Raises:
        StreamError: the name is taken, one of the two is not callable, or the name alone says nothing.
    """
    if get_state is None and set_state is None:
        get_state, set_state = _of_library(name)
    if not callable(get_state) or not callable(set_state):
        raise StreamError(
            f"source {name!r} needs two callables, get_state() and set_state(state)",
            fix='for example rng.register_source("python", random.getstate, random.setstate)',
        )
    return add(Stream(name, get_state, set_state))
