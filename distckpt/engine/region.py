"""Region: one checkpointed call, from its record to its last replay, and everything that belongs to it. Data only.

Note [Glossary]
    *Region*: one checkpointed call. The graph of its own outputs holds it (through the unpack hook of its slots) and
    nothing else does, so it dies with that graph. *Record*: its forward. *Replay*: its recomputation.

    Every tensor that a region has to do with is one of these:

    - *Input*: what the call names, positional, keyword, in containers, in a partial, or by name from outside. The
      region owns it as a saved tensor of autograd (or a :class:`Packed` of such) and frees it when it dies. A parameter
      is an input that stays where it is: the region holds a reference.
    - *Slot*: the place of one value that autograd would have saved. Autograd owns the slot, the region knows it weakly.
    - *Replayed value*: what a replay puts into a slot. It lives from the replay to its use; in a session to the
      session's release.
    - *Saved output*: what a selective policy keeps of the record. The region owns it until nothing can ask for it.
    - *Pinned value*: what ``dc.pin`` was given. Every region around owns it, and each replay is handed it.
    - *Buffer copy*: the value of a module's buffer that the record found. The region owns it; a replay starts from it.

    A *session* is a set of regions whose consumers share one replay. A *stash* is what random generators were at when
    the record began. A *turn* is one replay's right to move a generator. A *frame* is a record or a replay under way on
    a thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import Context, ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import torch
from torch.nn import Parameter

from distckpt._torch import tls_get
from distckpt.errors import BadOption, ParameterRead

if TYPE_CHECKING:
    from distckpt.engine.ambient import Ambient
    from distckpt.engine.buffers import Holders
    from distckpt.engine.closure import Captured, Names
    from distckpt.engine.compiler import Tie, Traced
    from distckpt.engine.determinism import Verifier
    from distckpt.engine.parameters import ModuleState, Stale
    from distckpt.engine.rng import Draw, Stash
    from distckpt.engine.sessions import Session


class InputKeeper(Protocol):
    """Keeps a region's inputs in another form than whole tensors (``ranks.partition``: 1/t of each on this rank)."""

    def own(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any], dict[str, Any] | None]:
        """Function, arguments and keywords as a region holds them: see :func:`distckpt.engine.inputs.own`."""
        ...


ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

DeterminismCheck = Literal["none", "default", "fingerprint", "bitwise"]
CHECKS: tuple[DeterminismCheck, ...] = ("none", "default", "fingerprint", "bitwise")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Options of a region. ``strict`` is the ``dc.*`` surface; without it the region behaves as torch's does.

    A strict region owns every tensor of its call and not only the positional ones, serves a saved tensor
    twice in one backward, changes buffers once, and raises where torch would be silently wrong.
    """

    preserve_rng_state: bool = True
    context_fn: ContextFn | None = None
    determinism_check: str | Callable[[Any], Any] = "default"
    debug: bool = False
    early_stop: bool = True
    respect_saved_tensors_hooks: bool | None = None
    name: str | None = None
    strict: bool = True
    partition: InputKeeper | None = None

    def __post_init__(self) -> None:
        if self.determinism_check not in CHECKS and not callable(self.determinism_check):
            raise BadOption(
                f"determinism_check should be one of {list(CHECKS)}, but got {self.determinism_check!r}",
                fix='"default" compares shape, dtype and device; "fingerprint" and "bitwise" compare values',
            )
        if self.partition is not None and not callable(getattr(self.partition, "own", None)):
            raise BadOption(
                f"partition is what coord.partition(group) returns, not a {type(self.partition).__name__}",
                fix="make one per process group, p = coord.partition(group), and pass partition=p",
            )


DEFAULT = Options()


"""The two switches that override a region's own options, per context rather than per process."""
early_stop_switch: ContextVar[bool | None] = ContextVar("distckpt.early_stop", default=None)
debug_switch: ContextVar[bool | None] = ContextVar("distckpt.debug", default=None)


@contextlib.contextmanager
def _switched(switch: ContextVar[bool | None], value: bool | None) -> Iterator[None]:
    token = switch.set(value)
    try:
        yield
    finally:
        switch.reset(token)


def set_checkpoint_early_stop(enable: bool) -> contextlib.AbstractContextManager[None]:
    """Decide for every region recorded in this context whether its replay may stop early.

    Needed around the forward only. Overrides ``early_stop=`` of each region; replays that happen later,
    also on another thread, see the value that the region was recorded under.
    """
    return _switched(early_stop_switch, enable)


def set_checkpoint_debug_enabled(enabled: bool | None) -> contextlib.AbstractContextManager[None]:
    """Decide for every region recorded in this context whether it logs its operators.

    Overrides ``debug=`` of each region; ``None`` gives the decision back to them.
    """
    return _switched(debug_switch, enabled)


class Slot:
    """What the graph of a region holds instead of a tensor.

    Autograd owns the slot; the region only knows it weakly. So a slot that is gone means that its part
    of the graph was freed, and a replay need not fill it. ``value`` is None except between a replay and
    the value's last use. ``meta`` is what was saved in the forward: (shape, dtype, device, version); the
    first three are None when nobody wants them checked. There is no ``__init__``: a call of one would
    cost more than the slot; whoever makes a slot sets both.
    """

    __slots__ = ("__weakref__", "meta", "value")

    meta: Any
    value: Any


class Doubtful:
    """A value whose operator may not have filled it. Its version equals no tensor's, so that no check lets it pass."""

    __slots__ = ("value",)
    _version = -1

    def __init__(self, value: Any) -> None:
        self.value = value


class Outdated:
    """A value computed from a changed parameter. Its version equals no tensor's, so that no check lets it pass."""

    __slots__ = ("names", "value")
    _version = -1

    def __init__(self, value: torch.Tensor, names: str) -> None:
        self.value = value
        self.names = names

    def error(self, where: str) -> ParameterRead:
        """The error for a gradient that asks for it."""
        return ParameterRead(
            "a value that a gradient needs was computed from a parameter that has changed since the forward",
            where=where,
            why=f"the replay computed it from {self.names}, in which an optimizer's step, a load of weights or .data = "
            "has put other numbers",
            fix="change parameters after backward, or run the forward again",
        )


class Packed:
    """A container whose tensors are owned: ``rebuild`` makes an equal one from the unpacked parts."""

    __slots__ = ("parts", "rebuild")

    def __init__(self, parts: list[Any], rebuild: Callable[[list[Any]], Any]) -> None:
        self.parts = parts
        self.rebuild = rebuild


class Region:
    """One checkpointed call. Made in ``record.py``, replayed in ``replay.py``, asked for its values in ``hooks.py``."""

    # Most regions need few of these; a class default costs nothing per call.
    fn: Any
    args: list[Any]
    kwargs: Any = None
    captured: list[Captured] | None = None  # what its functions read by name
    plain: tuple[Names, list[Any]] | None = (
        None  # the same of a function that reads no tensors and no functions
    )
    repeats = False  # the call names one thing several times
    options: Options
    refs: list[weakref.ref[Slot]]
    lock: Any
    context: Context
    ambient: Ambient
    early_stop: bool
    outer: Any = None
    closed = False
    # until the record ends: the modules that it reaches, and the parameters that the call holds by themselves
    reached: tuple[Holders | None, list[Parameter] | None] | None = None
    parameters: ModuleState | None = None  # after it: what those were
    buffers: Any = None
    rng_before: Any = None  # the CPU state, until the record ends
    stash: Stash | None = None  # other streams, until the record ends
    draws: list[Draw] | None = None  # after it: what the forward drew
    idle_cpu: Any = (
        None  # the CPU state, when it is where it was: perhaps drawn from, and put back by the function
    )
    idle: list[Draw] | None = None  # other streams that are where they were
    pins: list[Any] | None = None
    kept: Any = None  # what selective contexts keep for it
    session: Session | None = None
    inner = False  # in a session: whether the record lies in that of another region
    backward: Any = None  # the graph task or session of the last replay
    replay_context: Any = None
    log: Any = None
    verifier: Verifier | None = None
    tie: Tie | None = None
    traced: Traced | None = (
        None  # inside a graph that is being traced: nothing is dropped here, nothing replayed
    )
    pauses_script = False  # while it is recorded: TorchScript optimises outside of it
    scripted: int | None = None  # in a thread that runs TorchScript: how many optimised graphs the record ran
    # under the user's hooks: what the inputs were at the record and before the last replay; autograd checks no versions
    marks: Any = None

    def reach(self) -> int:
        """A replay that stops early reaches no operator that ran after this many saves of the record."""
        living = last_living(self.refs) if self.options.strict else len(self.refs)
        return living if living == len(self.refs) else living + 1

    def living(self) -> list[Slot]:
        """The slots that autograd still holds."""
        return [slot for slot in (ref() for ref in self.refs) if slot is not None]

    def clear(self) -> None:
        """Drop recomputed values that nobody asked for."""
        for ref in self.refs:
            slot = ref()
            if slot is not None:
                slot.value = None


def last_living(refs: list[weakref.ref[Slot]]) -> int:
    """How many saves there were up to the last one whose slot still lives."""
    n = len(refs)
    while n and refs[n - 1]() is None:
        n -= 1
    return n


class Frame:
    """One replay under way on this thread; ``pins`` counts the pinned values it has handed out.

    ``refused`` is the error that ends it, see :func:`refuse`; ``stale`` the parameters that it finds changed.
    """

    __slots__ = ("outer", "pins", "refused", "region", "stale")

    def __init__(self, region: Region, outer: Any) -> None:
        self.region = region
        self.outer = outer
        self.pins = 0
        self.refused: Exception | None = None
        self.stale: Stale | None = None


class _Thread(threading.local):
    frame: Frame | Region | None = None  # innermost; a Region is a record, a Frame is a replay
    replaying: int = 0
    last_cpu_state: Any = None  # an rng.CpuState: what the last region found or left
    settling: Region | None = None  # it is replayed a second time, as the engine itself needs it
    entering: Region | None = None  # the user's contexts around its record or its replay are being entered


here = _Thread()


def region_here() -> Region | None:
    """The innermost region that this thread records or replays, or None."""
    frame = here.frame
    return frame.region if isinstance(frame, Frame) else frame


SESSION = "distckpt.session"  # autograd copies the torch thread state to its device threads: the session travels in it

open_sessions: list[Session] = []
"""One for each ``with`` block that is open in this process: a hint that saves a look-up in the thread's state."""


def current_session() -> Session | None:
    """The session of this thread, or of the backward call that this device thread works for."""
    return tls_get(SESSION)


class Refusal(BaseException):
    """Ends a replay on its way to :func:`refuse`'s error; an ``except Exception`` of the user's lets it pass."""


def refuse(region: Region, error: Exception) -> NoReturn:
    """End the replay of ``region`` on this thread with ``error``, whatever its function catches.

    The function would go on with something else than the forward did.
    """
    frame = here.frame
    while frame is not None and not (type(frame) is Frame and frame.region is region):
        frame = frame.outer
    if type(frame) is not Frame:
        raise error
    frame.refused = frame.refused or error
    raise Refusal


def is_recomputing() -> bool:
    """True while this thread replays a region, False in every first forward.

    For metrics, counters and logging that must happen once per step::

        if not dc.is_recomputing():
            self.tokens_seen += x.numel()
    """
    return here.replaying > 0


def replaying(until: Region) -> Region | None:
    """The region of the innermost replay on this thread, not looking beyond the record of ``until``."""
    frame = here.frame
    while frame is not None and frame is not until:
        if type(frame) is Frame:
            return frame.region
        frame = frame.outer
    return None


def owner(region: Region) -> tuple[torch.nn.Module | None, bool]:
    """The module that a region runs, None for a function; and whether a replay goes through the module's hooks."""
    fn = region.fn
    if isinstance(fn, torch.nn.Module):
        return fn, True
    found = getattr(fn, "__self__", None)
    return (found, False) if isinstance(found, torch.nn.Module) else (None, True)


def describe(fn: Any, options: Options) -> str:
    """A region for people: its given name, or what it runs and where that is defined."""
    while isinstance(fn, (partial, Packed)):
        fn = fn.func if isinstance(fn, partial) else fn.parts[0]
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    kind = getattr(fn, "__qualname__", None) or type(fn).__name__
    if code is None and isinstance(fn, torch.nn.Module):
        code = getattr(type(fn).forward, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"region {options.name or kind}{place}"
