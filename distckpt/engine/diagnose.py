"""Diagnose: what went differently in a replay, and what was meant by a call that cannot be a region.

Note [Diagnosis]
    Nothing is paid before a replay has failed. Then only that region runs again, twice, with its operators logged:
    once as a forward and once as a replay. Where the two differ is the culprit. Where they agree, the state
    that the function depends on has changed since the forward, and the operator that ran at the failing
    position is named. With collectives under way no other rank would take part in these runs, so on several
    ranks only ``debug=True`` (which logs both real runs) names the operator.

Note [Misuse]
    Nothing here runs on a call that goes well: a wrong call fails by itself, and only then is it asked why. The one
    exception is an option's name that a function with ``**kwargs`` would swallow.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distckpt._torch import pop_saved_tensors_hooks, push_saved_tensors_hooks, set_grad_enabled
from distckpt.engine.region import Packed, here
from distckpt.errors import BadOption, LazyFunction, NeedsArguments, NotAFunction

if TYPE_CHECKING:
    from distckpt.engine.determinism import Mismatch
    from distckpt.engine.region import Region


_HIDDEN = ("/torch/", "/distckpt/engine/", "/distckpt_backends/", "/distckpt/compat/", "/distckpt/policy/")


class Entry(NamedTuple):
    """One operator: its call in words, the modules around it (outermost first), and its frames (innermost first)."""

    op: str
    modules: tuple[str, ...]
    frames: tuple[tuple[str, int, str], ...]

    @property
    def place(self) -> str:
        """``file:line`` of the user's code, and the module path."""
        for file, line, name in self.frames:
            if not any(part in file for part in _HIDDEN):
                within = f" in {'.'.join(self.modules)}" if self.modules else ""
                return f"{file}:{line} ({name}){within}"
        return "an unknown place"


def _short(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return repr(x) if len(repr(x)) < 40 else type(x).__name__


def _frames() -> tuple[tuple[str, int, str], ...]:
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(found)


class _Mode(TorchDispatchMode):
    def __init__(self, log: OpLog) -> None:
        super().__init__()
        self._log = log

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:  # the engine's own, and not the same in both runs
            shown = ", ".join([*map(_short, args), *(f"{k}={_short(v)}" for k, v in (kwargs or {}).items())])
            result = ", ".join(_short(x) for x in tree_leaves(out))
            self._log.entries.append(
                Entry(f"{result} = torch.ops.{func}({shown})", tuple(self._log.modules), _frames())
            )
        return out


class OpLog:
    """The operators of one run."""

    def __init__(self, names: dict[int, str] | None = None) -> None:
        self.entries: list[Entry] = []
        self.modules: list[str] = []
        self._names = names or {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Log what runs inside the block."""

        def enter(module: torch.nn.Module, args: Any) -> None:
            self.modules.append(self._names.get(id(module)) or type(module).__name__)

        def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
            if self.modules:
                self.modules.pop()

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with _Mode(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.modules.clear()


Replay = Callable[["Region", Any], None]
"""What runs a region again: see :func:`distckpt.engine.replay.replay`."""


class Log:
    """Operators of the record and of the last replay of one region (``debug=True``)."""

    def __init__(self) -> None:
        self.forward = OpLog()
        self.replay = OpLog()


class Found(NamedTuple):
    """Text to append to an error, and the place in the user's code."""

    text: str
    where: str | None


def _several_ranks() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def diagnose(mismatch: Mismatch, replay: Replay) -> Found:
    """Name the first diverging operator of the failed replay; ``replay(region, run)`` runs the region again."""
    r = mismatch.region
    position = _position(mismatch)
    saves: list[int] = []
    if r.log is not None:
        forward, again = r.log.forward.entries, r.log.replay.entries
    elif _several_ranks():
        return Found("\nOn several ranks pass debug=True to have the first diverging operator named.", None)
    else:
        try:
            forward, _ = _run_again(r, replay, as_replay=False)
            again, saves = _run_again(r, replay, as_replay=True)
        except Exception as error:
            return Found(f"\nRunning the region again to find the operator failed: {error}", None)
    for i, (a, b) in enumerate(zip(forward, again, strict=False)):
        if a.op != b.op:
            text = f"\nFirst difference, operator {i}:\n  forward: {a.op}\n    at {a.place}\n"
            text += f"  replay:  {b.op}\n    at {b.place}"
            return Found(text, b.place)
    if len(forward) != len(again):
        i = min(len(forward), len(again))
        longer, name = (forward, "forward") if len(forward) > i else (again, "replay")
        return Found(
            f"\nOnly the {name} ran operator {i}:\n  {longer[i].op}\n    at {longer[i].place}",
            longer[i].place,
        )
    entry = _entry_at(again, saves, position)
    if entry is None:
        return Found("", None)
    text = f"\nSaved tensor {position} belongs to this operator of the replay:\n  {entry.op}\n    at {entry.place}"
    return Found(text, entry.place)


def _position(mismatch: Mismatch) -> int | None:
    if mismatch.metas:
        return mismatch.metas[0][0]
    if mismatch.value_positions:
        return mismatch.value_positions[0]
    return None if mismatch.count is None else mismatch.count - 1


def _entry_at(entries: list[Entry], saves: list[int], position: int | None) -> Entry | None:
    if position is None or not entries or not 0 <= position < len(saves):
        return None
    return entries[min(saves[position], len(entries) - 1)]


def _run_again(r: Region, replay: Replay, as_replay: bool) -> tuple[list[Entry], list[int]]:
    fn = r.fn.parts[0] if isinstance(r.fn, Packed) else r.fn
    owner = getattr(fn, "__self__", fn)
    names = {id(m): n for n, m in owner.named_modules()} if isinstance(owner, torch.nn.Module) else {}
    log = OpLog(names)
    saves: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saves.append(len(log.entries))
        return x.detach()

    def run(r: Region, call: Any, generators: Any, mismatch: Any) -> bool:
        fn, args, kwargs, _ = call
        frame, replaying = here.frame, here.replaying
        assert frame is not None  # this replay's own
        if as_replay:
            here.replaying += 1
        else:
            here.frame, here.replaying = frame.outer, 0
        grad = torch.is_grad_enabled()
        set_grad_enabled(True)
        push_saved_tensors_hooks(pack, lambda x: x)
        try:
            with log.recording():
                r.context.copy().run(fn, *args, **kwargs)
        finally:
            pop_saved_tensors_hooks()
            set_grad_enabled(grad)
            here.frame, here.replaying = frame, replaying
        return False

    replay(r, run)
    return log.entries, saves


_REPORT = """\
An error happened while unpacking tensors; dumping logs of latest computation
because you passed `debug=True` to `torch.utils.checkpoint.checkpoint()`.

1. Stack traces of the operators that ran in the original forward

{forward_traces}
2. Stack traces of the operators that ran during recomputation

{replay_traces}
3. Log of operators in the original forward and recomputation

Operations executed during the original forward:

{forward}

Operations executed during recomputation:

{replay}

 ERROR: Detected non-determinism while running activation checkpointing

 You are seeing this error because you passed `debug=True` to checkpoint and
 the tensors saved during the original forward differ from those saved during
 recomputation. Compare the two operator lists above from the top: the first
 line that differs is where the runs part, and its stack trace says which line
 of your code ran it.
"""


def debug_report(log: Log) -> str:
    """Both operator logs of a region in words, with a stack trace for each operator."""

    def traces(label: str, entries: list[Entry]) -> str:
        total = len(entries)
        return "".join(
            f"{e.op}   ({i + 1} of {total} in {label})\n\n"
            + "".join(f"{f}:{n}:{w}\n" for f, n, w in e.frames)
            + "\n\n"
            for i, e in enumerate(entries)
        )

    forward, replay = log.forward.entries, log.replay.entries
    return _REPORT.format(
        forward_traces=traces("original", forward),
        replay_traces=traces("recompute", replay),
        forward="\n".join(e.op for e in forward),
        replay="\n".join(e.op for e in replay),
    )


# What calling a generator function or a coroutine function returns: nothing of its body has run.
LAZY = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType})

_LAZY_FUNCTIONS = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def code_of(fn: Any) -> CodeType | None:
    """The code that a call of ``fn`` runs, if it is Python's."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, torch.nn.Module):
        fn = fn.forward
    fn = getattr(fn, "__func__", fn)
    code = getattr(fn, "__code__", None)
    if code is None and not isinstance(fn, type):
        code = getattr(type(fn).__call__, "__code__", None) if callable(fn) else None
    return code


def parameters(code: CodeType) -> tuple[str, ...]:
    """The names of the parameters that can be given by keyword."""
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def is_lazy_function(fn: Any) -> bool:
    """Whether a call of ``fn`` returns before its body has run."""
    return any(is_one(fn) for is_one in _LAZY_FUNCTIONS)


def lazy(where: str, out: Any = None) -> LazyFunction:
    """Why a region may not run a generator function or a coroutine function; ``out`` is what it returned."""
    if isinstance(out, CoroutineType):
        out.close()  # or Python warns that nobody waited for it
    return LazyFunction(
        "a region cannot run a generator function or a coroutine function",
        where=where,
        why="its body runs after the region has ended: nothing would be recomputed, and everything kept",
        fix="put the region around the computation inside it, a plain function that returns tensors",
    )


def explain(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError, options: Collection[str]
) -> Exception | None:
    """A better error for a call that raised ``error``, where the call itself was wrong; None where it was not."""
    if not callable(fn):
        return _not_a_function(fn, args)
    found = _UNEXPECTED.search(str(error))
    if found and found[1] in kwargs:
        own = () if (code := code_of(fn)) is None else parameters(code)
        near = difflib.get_close_matches(found[1], [*own, *options], n=1)
        if near and near[0] in options:
            return unknown_option("dc.checkpoint", [found[1]], options)
    if not args and not kwargs and not _takes_nothing(fn):
        return NeedsArguments(
            f"dc.checkpoint({_name(fn)}) runs it at once, without arguments, and it needs some",
            where=_name(fn),
            why=str(error),
            fix="as a decorator write @dc.checkpoint(); as a call write dc.checkpoint(fn, x)",
        )
    return None


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _takes_nothing(fn: Any) -> bool:
    try:
        inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin that has no signature
        return True
    return True


def _not_a_function(fn: Any, args: tuple[Any, ...]) -> NotAFunction:
    fix = "dc.checkpoint(fn, x, key=value): the function first, then what it is called with"
    why = None
    if isinstance(fn, torch.Tensor):
        why = "the function has run already, outside any region: dc.checkpoint(model(x)) is given its result"
        fix = "dc.checkpoint(model, x): the function and its arguments apart"
        if any(callable(a) for a in args):
            why, fix = None, "dc.checkpoint(fn, x): the function comes first"
    elif isinstance(fn, (list, tuple)):
        fix = "dc.checkpoint_sequential(layers, segments, x) runs layers one after another"
    return NotAFunction(f"a region runs a function, not a {type(fn).__name__}", why=why, fix=fix)


def unknown_option(surface: str, names: Iterable[str], options: Collection[str]) -> BadOption:
    """The error for names that ``surface`` does not take."""
    names = sorted(names)
    near = [m for name in names for m in difflib.get_close_matches(name, options, n=1)]
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return BadOption(
        f"{surface} has no option {', '.join(names)}", fix=f"{meant}options: {', '.join(sorted(options))}"
    )


def warn_of_swallowed(
    fn: Any, names: Iterable[str], near_miss: Callable[[str], str | None], stacklevel: int
) -> None:
    """Warn of names that are nearly an option's and that ``fn`` would take into its ``**kwargs``."""
    for name in names:
        option = near_miss(name)
        if option is None:
            continue
        outer, inner = code_of(fn), code_of(inspect.unwrap(fn) if callable(fn) else fn)
        if outer is None or inner is None or not outer.co_flags & inspect.CO_VARKEYWORDS:
            continue
        if name not in parameters(outer) and name not in parameters(inner):
            warnings.warn(
                f"{name}= goes to {_name(fn)}, which takes any keyword; did you mean the option {option}= of "
                "dc.checkpoint? functools.partial gives it to the function without this warning",
                stacklevel=stacklevel,
            )


def near_misses(options: Collection[str]) -> Callable[[str], str | None]:
    """What says of a name which of ``options`` it is within two edits of; only for names of eight letters or more."""
    long = [option for option in options if len(option) >= 8]

    @functools.lru_cache(256)
    def near(name: str) -> str | None:
        if len(name) < 8:
            return None
        return next((o for o in long if abs(len(o) - len(name)) <= 2 and _edits(name, o) <= 2), None)

    return near


def _edits(a: str, b: str) -> int:
    """How many letters must be put in, taken out or exchanged to turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
