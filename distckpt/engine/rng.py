"""RNG stash of a region: what is read before the forward, kept after it, and restored for a replay.

Note [What is stashed]
    The CPU, every live device of the chosen device type (a read is two host integers), and every registered
    stream. A device of another type that moved is a draw nobody can replay. Of a stream that did not move the state is
    kept as well, shared by all regions since the last draw: the function may have drawn and put the state back
    (``fork_rng``), and nothing in a generator tells. Its replay writes a generator only when somebody has drawn
    from it since.

Note [Where the forward ended]
    The state after the forward is kept for what moved: a replay that ran to its end and left a generator somewhere
    else drew another number of values, so it is not the same computation.
"""

from __future__ import annotations

from typing import Any

import torch
from distckpt_backends import Backend, cpu, get, live

from distckpt.engine import streams
from distckpt.engine.state import here

CPU: Any = get("cpu")
CPU_DEVICE = torch.device("cpu")
cpu_stash = CPU.rng_stash
cpu_moved = CPU.rng_moved
cpu_fingerprint = cpu.fingerprint


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


_CPU_STREAM: Any = Generator(CPU, CPU_DEVICE)


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

    def __init__(self, chosen: tuple[Backend, ...], others: tuple[Backend, ...]) -> None:
        self.types = tuple(b.device_type for b in (*chosen, *others))
        self.own = [(s, s.get_state()) for b in chosen if b.capabilities.rng for s in _generators(b)] + [
            (s, s.get_state()) for s in streams.registered()
        ]
        # States of generators nobody will restore: only compared after the forward.
        self.foreign = [(s, s.get_state()) for b in others if b.capabilities.rng for s in _generators(b)]

    def moved(self) -> tuple[list[Draw], list[Draw], list[str]]:
        """The stashed streams that moved, those that did not, and the names of the foreign ones that did."""
        draws, idle = [], []
        for s, before in self.own:
            if s.moved(before):
                draws.append(Draw(s, before, s.get_state()))
            else:
                idle.append(Draw(s, before, before))
        return draws, idle, [s.name for s, before in self.foreign if s.moved(before)]


def _generators(backend: Backend) -> list[Generator]:
    kind = DeferredGenerator if backend.capabilities.deferred else Generator
    return [kind(backend, device) for device in backend.live_devices()]


class CpuState:
    """The state of the CPU generator at one moment, and a fingerprint that is cheap to compare."""

    __slots__ = ("fingerprint", "state")

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.state = cpu_stash(CPU_DEVICE)


def cpu_before() -> CpuState:
    """The CPU state now; the very object of the last region when nobody drew since, so that regions share it."""
    last = here.last_cpu_state
    now = cpu_fingerprint()
    if last is None or last.fingerprint != now:
        here.last_cpu_state = last = CpuState(now)
    return last


def cpu_draw(before: CpuState) -> Draw | None:
    """The CPU's draw since ``before``, or None."""
    now = cpu_fingerprint()
    if now == before.fingerprint or not cpu_moved(CPU_DEVICE, before.state):
        return None
    here.last_cpu_state = after = CpuState(now)
    return Draw(_CPU_STREAM, before.state, after.state)


def newly_live(before: tuple[str, ...]) -> list[str]:
    """Device types whose runtime came up since ``before`` was taken."""
    return [b.device_type for b in live() if b.device_type not in before]


def rewind_idle(cpu: CpuState | None, idle: list[Draw] | None) -> list[tuple[Any, Any]]:
    """Of the streams that the forward did not move, put those back that are not where it began."""
    elsewhere = [draw for draw in idle if draw.stream.moved(draw.before)] if idle else []
    if cpu is not None and cpu_fingerprint() != cpu.fingerprint:
        elsewhere.append(Draw(_CPU_STREAM, cpu.state, cpu.state))
    return rewind(elsewhere) if elsewhere else []


def rewind(draws: list[Draw]) -> list[tuple[Any, Any]]:
    """Put every stream where the forward began; returns what :func:`put_back` needs."""
    held = [(draw.stream, draw.stream.lend()) for draw in draws]
    for draw in draws:
        draw.stream.set_state(draw.before)
    return held


def put_back(held: list[tuple[Any, Any]]) -> None:
    """Undo :func:`rewind`."""
    for stream, state in held:
        stream.take_back(state)


def pending(draws: list[Draw]) -> list[Draw]:
    """The streams that are not where the forward ended."""
    return [draw for draw in draws if draw.stream.moved(draw.after)]


def so_far(cpu: CpuState | None, stash: Stash | None) -> list[Draw]:
    """Every stashed stream of a forward that is still running, for a gradient taken inside it."""
    draws = [] if cpu is None else [Draw(_CPU_STREAM, cpu.state, None)]
    return draws if stash is None else [*draws, *(Draw(s, before, None) for s, before in stash.own)]
