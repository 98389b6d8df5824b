"""RNG stash of a region: what is read before the forward, kept after it, and restored for a replay.

Note [What is stashed]
    The CPU, every live device of the chosen device type (a read is two host integers), every registered stream, and
    every other generator that the call passes or that its functions read by name. A device of another type that moved
    is a draw nobody can replay. Of a stream that did not move the state is kept as well, shared by all regions since
    the last draw: the function may have drawn and put the state back (``fork_rng``), and nothing in a generator tells.
    Its replay writes a generator only when somebody has drawn from it since.

Note [Where the forward ended]
    The state after the forward is kept for what moved. A replay may stop early where every generator that it drew
    from is in that state, and every other is where it began. Elsewhere it runs on to its end: random numbers may follow
    the last saved tensor, and a function that puts a state back itself does so there. At the end a generator that it
    drew from must be where the forward left it, or it drew another number of values and is not the same computation.
    A replay that left a generator alone cannot have got wrong numbers from it, whatever the forward did (a lazy module
    makes its parameters in its first call only). A generator that the forward did not move may have been moved by
    another thread meanwhile, so it is only called a difference, and put back, where there is no other thread.

Note [The single-device-type rule]
    CPU plus exactly one other type. ``meta`` and CPU tensors never count. Of several types CUDA is chosen, else
    the first met.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from distckpt_backends import Backend, cpu, get, live
from distckpt_backends.rule import select

from distckpt._torch import dispatch_mode_is_on, without_dispatch_modes
from distckpt.engine import streams
from distckpt.engine.region import here
from distckpt.engine.streams import Turn
from distckpt.errors import BadOption, MixedDeviceTypes

_RULES = ("error", "warn", "all")
_rule: ContextVar[str | None] = ContextVar("distckpt.devices.rule", default=None)


class _Rule(contextlib.AbstractContextManager[None]):
    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __exit__(self, *exc: object) -> None:
        _rule.set(self._previous)


def rule(name: str) -> contextlib.AbstractContextManager[None]:
    """What a region does when its inputs live on two device types besides the CPU.

    ``"error"`` refuses (the default of ``dc.*``), ``"warn"`` stashes one type and warns (torch's behaviour, and
    the default of ``dc.compat``), ``"all"`` stashes every type met. Takes effect at once in this context
    and in contexts copied from it later; as a context manager it is undone on exit.

    Raises:
        BadOption: an unknown rule.
    """
    if name not in _RULES:
        raise BadOption(f"unknown device rule {name!r}", fix=f"use one of {', '.join(_RULES)}")
    undo = _Rule(_rule.get())
    _rule.set(name)
    return undo


def current_rule(default: str) -> str:
    """The rule in force here, or ``default`` when nobody set one."""
    return _rule.get() or default


class DefaultDeviceType:
    """The device type whose random state a region stashes when no input tensor names one.

    Starts as the current accelerator's type, or ``"cpu"`` on a machine without one.
    """

    _type: str | None = None

    @staticmethod
    def set_device_type(device: str = "cuda") -> None:
        """Use ``device`` (a type such as ``"cuda"``) from now on, in the whole process."""
        DefaultDeviceType._type = device

    @staticmethod
    def get_device_type() -> str:
        """The device type in use."""
        if not DefaultDeviceType._type:
            found = torch.accelerator.current_accelerator(True)
            DefaultDeviceType._type = found.type if found else "cpu"
        return DefaultDeviceType._type


MIXED_WARNING = (
    "Tensor arguments, excluding CPU tensors, are detected on at least two types of devices. "
    "Only {chosen} random state is stashed and restored; a draw on {others} inside the region would be "
    "different in the recomputation, and gradients with it.\nDevice types: {types} first device type: {first}"
)


def device_types(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Distinct types besides CPU and meta, in the order met."""
    seen: dict[str, None] = {}
    for tensor in tensors:
        kind = tensor.device.type
        if kind != "cpu" and kind != "meta":
            seen.setdefault(kind)
    return list(seen)


def choose(types: list[str], rule_name: str, where: str) -> list[str]:
    """The device types to stash, by the rule.

    Raises:
        MixedDeviceTypes: more than one type under the rule ``"error"``.
    """
    if len(types) <= 1:
        return types
    chosen = select(types)
    assert chosen is not None
    if rule_name == "all":
        return types
    if rule_name == "error":
        raise MixedDeviceTypes(
            f"inputs of a region live on {' and '.join(types)}",
            where=where,
            why="a region stashes the random state of the CPU and one other device type",
            fix='move the inputs to one type, or choose dc.devices.rule("all") to stash every type',
        )
    others = ", ".join(t for t in types if t != chosen)
    text = MIXED_WARNING.format(chosen=chosen, others=others, types=sorted(types), first=types[0])
    warnings.warn(text, stacklevel=5)
    return [chosen]


def stashed_backends(types: list[str], live: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """Of the live backends, those whose generators a region with inputs on ``types`` stashes."""
    if types:
        return tuple(b for b in live if b.device_type in types)
    if len(live) == 1:
        return live
    default: Any = DefaultDeviceType.get_device_type()
    return tuple(b for b in live if b.device_type == default) or live[:1]


CPU: Any = get("cpu")
CPU_DEVICE = torch.device("cpu")
cpu_stash = CPU.rng_stash
cpu_moved = CPU.rng_moved
cpu_drawn_since = cpu.drawn_since


class Generator:
    """The generator of one device, as a stream."""

    __slots__ = ("backend", "device")

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend = backend
        self.device = device

    @property
    def name(self) -> str:
        return str(self.device)

    def get_state(self) -> Any:
        return self.backend.rng_stash(self.device)

    def set_state(self, state: Any) -> None:
        self.backend.rng_restore(self.device, state)

    def moved(self, state: Any) -> bool:
        return self.backend.rng_moved(self.device, state)

    lend = get_state
    take_back = set_state


class DeferredGenerator(Generator):
    """A generator whose device knows more than its state says."""

    __slots__ = ()

    def lend(self) -> Any:
        return self.backend.rng_lend(self.device)

    def take_back(self, state: Any) -> None:
        self.backend.rng_take_back(self.device, state)


class CpuGenerator(Generator):
    """The CPU's generator. Its states carry a fingerprint, so that to compare with one is cheap."""

    __slots__ = ()

    def get_state(self) -> CpuState:
        return CpuState()

    def set_state(self, state: CpuState) -> None:
        self.backend.rng_restore(self.device, state.state)

    def moved(self, state: CpuState) -> bool:
        return cpu_drawn_since(state.fingerprint) and cpu_moved(CPU_DEVICE, state.state)

    lend = get_state
    take_back = set_state


_CPU_GENERATOR: Any = CpuGenerator(CPU, CPU_DEVICE)


class Draw:
    """A stream that moved during the forward: its state before and after."""

    __slots__ = ("after", "before", "stream")

    def __init__(self, stream: Any, before: Any, after: Any) -> None:
        self.stream = stream
        self.before = before
        self.after = after


class Stash:
    """States read before a forward, for everything but the CPU (which the region reads itself)."""

    __slots__ = ("foreign", "own", "types")

    def __init__(
        self,
        chosen: tuple[Backend, ...],
        others: tuple[Backend, ...],
        given: Iterable[torch.Generator] | None = None,
    ) -> None:
        self.types = tuple(b.device_type for b in (*chosen, *others))
        self.own = [(s, s.get_state()) for b in chosen if b.capabilities.rng for s in _generators(b)] + [
            (s, s.get_state()) for s in streams.registered()
        ]
        if given is not None:
            self.own += [(s, s.get_state()) for s in streams.unregistered(given)]
        # States of generators nobody will restore: only compared after the forward.
        passed = [g.device for g in given or () if _is_default(g)]
        self.foreign = [
            (s, s.get_state())
            for b in others
            if b.capabilities.rng
            for s in _generators(b)
            if s.device not in passed
        ]

    def moved(self) -> tuple[list[Draw], list[Draw], list[str]]:
        """The stashed streams that moved, those that did not, and the names of the foreign ones that did."""
        draws, idle = [], []
        for s, before in self.own:
            if s.moved(before):
                draws.append(Draw(s, before, s.get_state()))
            else:
                idle.append(Draw(s, before, before))
        return draws, idle, [s.name for s, before in self.foreign if s.moved(before)]


def _is_default(generator: torch.Generator) -> bool:
    device = generator.device
    return device.type != "cpu" and any(
        g is generator for g in getattr(torch.get_device_module(device), "default_generators", ())
    )


def _generators(backend: Backend) -> list[Generator]:
    kind = DeferredGenerator if backend.capabilities.deferred else Generator
    return [kind(backend, device) for device in backend.live_devices()]


class CpuState:
    """The state of the CPU generator at one moment, and a fingerprint that is cheap to compare.

    For the replay of a region that has found it there, and moves no other generator, it answers as :class:`Rewound`.
    """

    __slots__ = ("fingerprint", "state")

    def __init__(self) -> None:
        self.fingerprint = mark = cpu.fingerprint()
        self.state = mark if isinstance(mark, torch.Tensor) else cpu_stash(CPU_DEVICE)

    def at_rest(self) -> bool:
        return not cpu_drawn_since(self.fingerprint)

    def astray(self) -> list[str]:
        return [_CPU_GENERATOR.name] if _alone() and _CPU_GENERATOR.moved(self) else []

    def give_back(self) -> None:
        if not self.at_rest() and self.astray():
            _CPU_GENERATOR.set_state(self)


def _alone() -> bool:
    return threading.active_count() == 1


def cpu_before() -> CpuState:
    """The CPU state now; the very object of the last region when nobody drew since, so that regions share it."""
    last = here.last_cpu_state
    if last is None or cpu_drawn_since(last.fingerprint):
        here.last_cpu_state = last = CpuState()
    return last


def cpu_draw(before: CpuState) -> Draw | None:
    """The CPU's draw since ``before``, or None."""
    if not cpu_drawn_since(before.fingerprint) or not _CPU_GENERATOR.moved(before):
        return None
    here.last_cpu_state = after = CpuState()
    return Draw(_CPU_GENERATOR, before, after)


def newly_live(before: tuple[str, ...]) -> list[str]:
    """Device types whose runtime came up since ``before`` was taken."""
    return [b.device_type for b in live() if b.device_type not in before]


class Rewound:
    """The generators of one replay, put where its forward began, until :meth:`give_back`."""

    __slots__ = ("_draws", "_held", "_idle", "_turn")

    def __init__(self, draws: list[Draw] | None, idle_cpu: CpuState | None, idle: list[Draw] | None) -> None:
        self._draws = draws or []
        self._idle = list(idle or ())
        if idle_cpu is not None:
            self._idle.append(Draw(_CPU_GENERATOR, idle_cpu, idle_cpu))
        self._turn: Turn | None = None
        self._held: list[tuple[Any, Any]] = []
        moved = [draw for draw in self._idle if draw.stream.moved(draw.before)]
        if not self._draws and not moved:
            return
        self._turn = Turn([draw.stream.name for draw in (*self._draws, *moved)])
        try:
            # Asked again: what looked moved may have been another replay's doing, which has put it back by now.
            elsewhere = [*self._draws, *(draw for draw in moved if draw.stream.moved(draw.before))]
            self._held = rewind(elsewhere) if elsewhere else []
        except BaseException:
            self._turn.end()
            raise

    def at_rest(self) -> bool:
        """Whether the replay may stop here, see Note [Where the forward ended]."""
        with _unseen((*self._draws, *self._idle)):
            return not _elsewhere(self._draws) and not any(d.stream.moved(d.before) for d in self._idle)

    def astray(self) -> list[str]:
        """The streams that a replay that has run to its end left somewhere else than the forward did."""
        with _unseen((*self._draws, *self._idle)):
            found = _elsewhere(self._draws)
            if _alone():
                found += [d.stream.name for d in self._idle if d.stream.moved(d.before)]
            return found

    def give_back(self) -> None:
        """Put every stream where it was found."""
        try:
            put_back(self._held)
            if _alone():
                held = [stream for stream, _ in self._held]
                put_back(
                    [
                        (d.stream, d.before)
                        for d in self._idle
                        if d.stream not in held and d.stream.moved(d.before)
                    ]
                )
        finally:
            if self._turn is not None:
                self._turn.end()


def _elsewhere(draws: list[Draw]) -> list[str]:
    return [d.stream.name for d in draws if d.stream.moved(d.after) and d.stream.moved(d.before)]


def _unseen(draws: Iterable[Draw]) -> contextlib.AbstractContextManager[Any]:
    """A source that the user registered may run operators to read its state; they are none of the region's."""
    if dispatch_mode_is_on() and any(isinstance(draw.stream, streams.Stream) for draw in draws):
        return without_dispatch_modes()
    return contextlib.nullcontext()


def rewind(draws: list[Draw]) -> list[tuple[Any, Any]]:
    """Put every stream where the forward began; returns what :func:`put_back` needs."""
    held = [(draw.stream, draw.stream.lend()) for draw in draws]
    try:
        for draw in draws:
            draw.stream.set_state(draw.before)
    except BaseException:
        put_back(held)
        raise
    return held


def put_back(held: list[tuple[Any, Any]]) -> None:
    """Undo :func:`rewind`."""
    for stream, state in held:
        stream.take_back(state)


def so_far(cpu: CpuState | None, stash: Stash | None) -> list[Draw]:
    """Every stashed stream of a forward that is still running, for a gradient taken inside it."""
    draws = [] if cpu is None else [Draw(_CPU_GENERATOR, cpu, None)]
    return draws if stash is None else [*draws, *(Draw(s, before, None) for s, before in stash.own)]
