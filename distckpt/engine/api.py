"""``dc.checkpoint`` and ``dc.checkpoint_sequential``: the calls that people write."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import CodeType, NoneType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

import torch

from distckpt._torch import skip_frame, torch_operator
from distckpt.engine import diagnose
from distckpt.engine.inputs import Wrapping
from distckpt.engine.record import run
from distckpt.engine.reentrant import reentrant
from distckpt.engine.region import DEFAULT, ContextFn, DeterminismCheck, Options, Partition
from distckpt.errors import BadOption, NotAFunction, OptionCollision

P = ParamSpec("P")
T = TypeVar("T")

OPTION_NAMES = frozenset(
    {
        "use_reentrant",
        "preserve_rng_state",
        "context_fn",
        "determinism_check",
        "debug",
        "early_stop",
        "respect_saved_tensors_hooks",
        "policy",
        "name",
        "partition",
    }
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_collisions: dict[CodeType, frozenset[str]] = {}
_near_miss = diagnose.near_misses(OPTION_NAMES)


def parameters_that_collide(fn: Any) -> frozenset[str]:
    """Parameters of ``fn`` named like an option. Cached by code object: a call never takes a signature."""
    code = diagnose.code_of(fn)
    if code is None:
        return frozenset()
    if _is_dynamo_compiling():  # it cannot guard a dictionary whose keys are code objects
        return _options_among(code)
    found = _collisions.get(code)
    if found is None:
        found = _collisions[code] = _options_among(code)
    return found


def _options_among(code: CodeType) -> frozenset[str]:
    return OPTION_NAMES.intersection(diagnose.parameters(code))


def split(fn: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options, and what is left for ``fn``.

    Raises:
        OptionCollision: an option that ``fn`` takes as well.
    """
    options = {k: v for k, v in kwargs.items() if k in OPTION_NAMES}
    if len(options) < len(kwargs) and not _is_dynamo_compiling():
        diagnose.warn_of_swallowed(fn, kwargs, _near_miss, stacklevel=4)
    if not options:
        return options, kwargs
    both = parameters_that_collide(fn).intersection(options)
    if both:
        names = ", ".join(sorted(both))
        raise OptionCollision(
            f"{names} is an option of dc.checkpoint and a parameter of the wrapped function",
            where=getattr(fn, "__qualname__", type(fn).__name__),
            why="the call cannot tell which of the two it is meant for",
            fix=f"dc.checkpoint({names}=...)(fn)(...) gives it to the option, functools.partial(fn, {names}=...) to fn",
        )
    return options, {k: v for k, v in kwargs.items() if k not in OPTION_NAMES}


def make_options(given: dict[str, Any]) -> tuple[Options, bool]:
    """Checked options, and whether the region is reentrant.

    Raises:
        BadOption: a value that cannot be honoured.
    """
    if not given:
        return DEFAULT, False
    given = dict(given)
    use_reentrant = given.pop("use_reentrant", False)
    if use_reentrant not in (True, False):
        raise BadOption(
            f"use_reentrant is True or False, not {use_reentrant!r}", fix="leave it out: the default is False"
        )
    if given.pop("policy", None) is not None:
        raise BadOption(
            "policy= needs data policies, which this version does not have",
            fix="select operators with context_fn=functools.partial(dc.create_selective_checkpoint_contexts, [ops])",
        )
    for key in ("preserve_rng_state", "debug", "early_stop"):
        if key in given and not isinstance(given[key], bool):
            raise BadOption(f"{key} is True or False, not {given[key]!r}", fix="leave it out for the default")
    if not isinstance(given.get("name"), (str, NoneType)):
        raise BadOption(
            f"name is a text, not {given['name']!r}", fix='name="block 3": what errors call the region'
        )
    if given.get("context_fn") is not None and not callable(given["context_fn"]):
        raise BadOption(
            f"context_fn is a function that returns two context managers, not a {type(given['context_fn']).__name__}",
            fix="context_fn=functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])",
        )
    if use_reentrant:
        extra = [
            k for k in ("context_fn", "debug", "respect_saved_tensors_hooks", "partition") if given.get(k)
        ]
        if given.get("determinism_check", "none") != "none":
            extra.append("determinism_check")
        if extra:
            raise BadOption(
                f"a reentrant region cannot honour {', '.join(extra)}",
                fix="leave use_reentrant at its default, False",
            )
    return (Options(**given) if given else DEFAULT), bool(use_reentrant)


def _call(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    options, use_reentrant = make_options(given)
    if not use_reentrant:
        return run(fn, args, kwargs, options)
    if _is_dynamo_compiling():
        return torch_operator(fn, args, kwargs, {"use_reentrant": True})
    return reentrant(fn, args, kwargs, options)


class Checkpointed(Wrapping):
    """A function whose every call is a region. As a class attribute it binds like the function it wraps."""

    def __init__(self, function: Callable[..., Any], given: dict[str, Any]) -> None:
        self.function = function
        self.given = given
        functools.update_wrapper(self, function, updated=())

    def around(self, function: Callable[..., Any]) -> Checkpointed:
        return type(self)(function, self.given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call(self.function, args, kwargs, self.given)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        bind = getattr(self.function, "__get__", None)
        return self if bind is None else type(self)(bind(instance, owner), self.given)


def _decorator(given: dict[str, Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    unknown = set(given) - OPTION_NAMES
    if unknown:
        raise diagnose.unknown_option("dc.checkpoint", unknown, OPTION_NAMES)
    make_options(given)  # complain here, not at the first call

    def decorate(fn: Callable[..., T]) -> Callable[..., T]:
        if diagnose.is_lazy_function(fn):
            raise diagnose.lazy(fn.__qualname__)
        return Checkpointed(fn, given)

    return decorate


if TYPE_CHECKING:

    class Decorator(Protocol):
        """What ``dc.checkpoint(**options)`` returns: the function's parameters and result stay."""

        def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...

    @overload
    def checkpoint(
        function: Callable[..., T],
        *args: Any,
        use_reentrant: bool = False,
        preserve_rng_state: bool = True,
        context_fn: ContextFn | None = None,
        determinism_check: DeterminismCheck = "default",
        debug: bool = False,
        early_stop: bool = True,
        respect_saved_tensors_hooks: bool | None = None,
        policy: None = None,
        name: str | None = None,
        partition: Partition | None = None,
        **kwargs: Any,
    ) -> T: ...

    @overload
    def checkpoint(
        function: None = None,
        *,
        use_reentrant: bool = False,
        preserve_rng_state: bool = True,
        context_fn: ContextFn | None = None,
        determinism_check: DeterminismCheck = "default",
        debug: bool = False,
        early_stop: bool = True,
        respect_saved_tensors_hooks: bool | None = None,
        policy: None = None,
        name: str | None = None,
        partition: Partition | None = None,
    ) -> Decorator: ...


def checkpoint(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Run ``function(*args, **kwargs)`` as a region: recompute its activations in backward instead of storing them.

    ``dc.checkpoint(fn, x, key=value)`` runs at once, and so does ``dc.checkpoint(fn)``. Without a function it returns
    a decorator: ``@dc.checkpoint()`` or ``dc.checkpoint(determinism_check="bitwise")(fn)``; then the options cannot
    collide with ``fn``'s own names.

    Args:
        function: what to run. Tensors in its arguments, also in containers and partials, are the region's inputs.
        use_reentrant: the old variant, one backward inside another; kept for code that needs it.
        preserve_rng_state: stash the random state of the CPU, of one other device type and of registered streams.
        context_fn: returns the two contexts that the forward and each replay run in (selective regions).
        determinism_check: ``"none"``, ``"default"`` (shape, dtype, device), ``"fingerprint"`` (a checksum of the
            values) or ``"bitwise"`` (an exact copy of the values, for tests).
        debug: log the operators of both runs, so that an error can show them.
        early_stop: end a replay when everything that is needed has been recomputed.
        respect_saved_tensors_hooks: whether tensors kept by a selective region go through the user's
            ``saved_tensors_hooks``.
        policy: reserved for data policies; only None.
        name: what errors and reports call this region.
        partition: keep 1/t of the region's inputs per rank, and gather them for the replay: what
            ``coord.partition(group)`` returns.

    Returns:
        What ``function`` returns; gradients through it equal those of a plain call to the bit.

    Raises:
        OptionCollision: an option that ``function`` takes as well (DC108).
        BadOption: an unknown or impossible option value (DC109).
        NotAFunction: what should run cannot be called (DC136).
        NeedsArguments: ``dc.checkpoint(fn)``, which runs ``fn()``, and ``fn`` needs arguments (DC137).
        LazyFunction: a generator function or a coroutine function (DC138).
        MixedDeviceTypes, UnstashedDraw, LateDevice: random state that could not be replayed (DC105 to DC107).
        CheckpointError: in backward, when the replay is not the same computation (DC101 to DC104, DC111 to DC114).
    """
    if function is None and not args:
        return _decorator(kwargs)
    try:
        if not kwargs:
            return run(function, args, kwargs, DEFAULT)
        given, kwargs = split(function, kwargs)
        return _call(function, args, kwargs, given)
    except TypeError as error:
        if (better := diagnose.explain(function, args, kwargs, error, OPTION_NAMES)) is None:
            raise
        raise better from error


skip_frame(checkpoint)
skip_frame(_call)
skip_frame(Checkpointed.__call__)
checkpoint.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("function", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in (
                ("use_reentrant", False),
                ("preserve_rng_state", True),
                ("context_fn", None),
                ("determinism_check", "default"),
                ("debug", False),
                ("early_stop", True),
                ("respect_saved_tensors_hooks", None),
                ("policy", None),
                ("name", None),
                ("partition", None),
            )
        ),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def chunk(functions: Any, segments: int) -> list[list[Callable[[Any], Any]]]:
    """``functions`` in ``segments`` runs of equal length; the last one takes what is left over."""
    items = list(functions.children()) if isinstance(functions, torch.nn.Sequential) else list(functions)
    size = len(items) // segments
    starts = list(range(0, size * (segments - 1), size)) if size else []
    return [items[s : s + size] for s in starts] + [items[size * len(starts) :]]


def run_chunk(functions: Sequence[Callable[[Any], Any]], x: Any) -> Any:
    """Apply the functions one after another."""
    for function in functions:
        x = function(x)
    return x


def checkpoint_sequential(functions: Any, segments: int, input: Any, **options: Any) -> Any:
    """Run a sequence in ``segments`` regions; the last one is not checkpointed, since backward starts there.

    Args:
        functions: an ``nn.Sequential`` or a sequence of callables of one argument.
        segments: number of parts, 1 to ``len(functions)``.
        input: the first input.
        options: any option of :func:`checkpoint`.

    Raises:
        BadOption: an unknown option, or a number of segments that the sequence cannot be cut into.
        NotAFunction: ``functions`` is no sequence.
    """
    unknown = set(options) - OPTION_NAMES
    if unknown:
        raise diagnose.unknown_option("dc.checkpoint_sequential", unknown, OPTION_NAMES)
    if not isinstance(functions, (torch.nn.Sequential, torch.nn.ModuleList, Sequence)) or isinstance(
        functions, str
    ):
        raise NotAFunction(
            f"checkpoint_sequential runs an nn.Sequential or a sequence of functions, not a {type(functions).__name__}",
            fix="dc.checkpoint_sequential(layers, segments, x); dc.checkpoint(fn, x) runs one function",
        )
    if isinstance(segments, bool) or not isinstance(segments, int):
        raise BadOption(
            f"segments is a whole number, not {segments!r}",
            fix=f"dc.checkpoint_sequential(functions, {min(2, max(len(functions), 1))}, x)",
        )
    if not 1 <= segments <= max(len(functions), 1):
        raise BadOption(
            f"cannot cut {len(functions)} functions into {segments} segments",
            fix="use 1 to as many as there are",
        )
    *checkpointed, last = chunk(functions, segments)
    for part in checkpointed:
        input = _call(functools.partial(run_chunk, part), (input,), {}, options)
    return run_chunk(last, input)
