"""Misuse: calls that cannot be what their writer meant, and the sentence that says so.

Nothing here runs on a call that goes well: a wrong call fails by itself, and only then is it asked why. The one
exception is an option's name that a function with ``**kwargs`` would swallow.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import Any

import torch

from distckpt.errors import BadOption, LazyFunction, NeedsArguments, NotAFunction

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
