"""ModuleRegion: what turns the forward of one module into a region.

It lives in the module's own ``__dict__`` as a bound method under the key ``forward``: the innermost thing that
``module(...)`` calls, inside every hook on the module whoever registered it and whenever.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import Any

import torch

from distckpt._torch import skip_frame
from distckpt.engine.record import run
from distckpt.engine.region import Options
from distckpt.errors import AlreadyRegion, ModuleGone, Rebound

_OPERATOR_NAMES = frozenset({"function", *(field.name for field in fields(Options)), "use_reentrant"})

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class ModuleRegion:
    """The options of one module's region, bound weakly to the module.

    Copies and pickles follow the module: a deep copy of the module has a region of its own. ``options`` is None
    once the region is taken off, for callers that still hold its ``forward``. ``plain(module, args, kwargs)``, if
    given, says which calls must not be regions.
    """

    __slots__ = ("__weakref__", "inner", "module", "options", "plain", "replaced")

    def __init__(
        self, module: torch.nn.Module, options: Options, plain: Callable[..., bool] | None = None
    ) -> None:
        self.plain = plain
        # Weak: a strong reference would be a cycle, and `del model` would no longer free its parameters.
        self.module = weakref.ref(module)
        self.options: Options | None = options
        present = region_of(module)
        if present is not None and present.module() is module:
            raise AlreadyRegion(
                f"a module {type(module).__name__} is a region already",
                why="each of its calls would be recomputed twice",
                fix="take the first region off: remove() on the handle, or on distckpt.modules.regions(model)",
            )
        # What the module's dict holds already (None: nothing), put back by detach. After copy.copy that is the
        # forward of the original's region, which is not this module's own.
        self.replaced = None if present is not None else module.__dict__.get("forward")
        # None means the class's forward, looked up at each call: fully_shard changes the class later.
        self.inner = self.replaced
        if self.inner is None and not isinstance(getattr_static(type(module), "forward"), FunctionType):
            self.inner = module.forward

    def __getstate__(self) -> tuple[Any, ...]:
        return self.module(), self.options, self.inner, self.replaced, self.plain

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        module, self.options, self.inner, self.replaced, self.plain = state
        self.module = weakref.ref(module)

    @property
    def forward(self) -> MethodType:
        """What goes into the module. Pickle finds it again under this name."""
        return MethodType(_entry_point(self), self)

    def attach(self) -> None:
        """Make the module's forward a region."""
        module = self.module()
        assert module is not None
        module.__dict__["forward"] = self.forward

    def detach(self) -> None:
        """Undo :meth:`attach`. A forward that others put over ours stays, and ours becomes a plain call."""
        module = self.module()
        if module is not None and region_of(module) is self:
            if self.replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = self.replaced
        self.options = None


def region_of(module: torch.nn.Module) -> ModuleRegion | None:
    """The region that ``module.forward`` is, or None. After ``copy.copy`` it belongs to another module."""
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, ModuleRegion) else None


def _call(region: ModuleRegion, /, *args: Any, **kwargs: Any) -> Any:
    if type(region) is not ModuleRegion:
        raise _rebound(region)
    module = region.module()
    if module is None:
        raise ModuleGone(
            "a region was called after its module was deleted",
            why="a region belongs to one module, and only a deep copy of the module gets its own",
            fix="keep the module that dc.apply was given, or call dc.apply on the copy",
        )
    plain = region.plain
    options = None if plain is not None and plain(module, args, kwargs) else region.options
    return _open(module, region.inner, options, args, kwargs)


def _rebound(owner: object) -> Rebound:
    return Rebound(
        f"the function of a region's forward was bound to a {type(owner).__name__}, and no longer knows its region",
        why="somebody took module.forward.__func__ and made a method of the module's of it; accelerate does so to the "
        "model that it prepares with mixed precision",
        fix="make regions of the model's layers and not of the model itself (which saves nothing at the peak), or call "
        "dc.apply after Accelerator.prepare",
    )


def _open(
    module: torch.nn.Module,
    inner: Any,
    options: Options | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if is_dynamo_compiling():
        return _trace(module, inner, options, args, kwargs)
    if inner is None:
        # A bound method: the graph keeps the module alive until the replay, and the engine finds its buffers.
        inner = MethodType(type(module).forward, module)
    return inner(*args, **kwargs) if options is None else run(inner, args, kwargs, options)


def _trace(
    module: torch.nn.Module,
    inner: Any,
    options: Options | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if inner is None:
        inner = partial(type(module).forward, module)  # Dynamo cannot make a bound method on every torch
    if options is None:
        return inner(*args, **kwargs)
    for name in kwargs:
        if name in _OPERATOR_NAMES:
            # torch's operator would take this argument of the module's for an option of its own.
            return run(partial(inner, **kwargs), args, {}, options)
    return run(inner, args, kwargs, options)


# `_call` is the frame that Dynamo starts from with `layer.compile()`. Below it, nothing may be a frame of its own:
# after a graph break Dynamo rebuilds a bound method by name, and `module.forward` is the region, not what it runs.
skip_frame(_open)


def _entry_point(region: ModuleRegion) -> FunctionType:
    """A function that looks like the module's own forward to ``inspect`` and runs :func:`_call`.

    One function object per module, one code object for all: Dynamo guards an instance's forward by its code when
    that is a bound method, so layers that compile one by one still share one graph. An own callable class would be
    guarded by identity, and every layer would compile again until Dynamo's limit turns it off.
    """
    entry = FunctionType(_call.__code__, _call.__globals__, "forward")
    module: Any = region.module()
    original = region.inner if region.inner is not None else type(module).forward
    for attribute in ("__module__", "__qualname__", "__doc__"):
        if hasattr(original, attribute):
            setattr(entry, attribute, getattr(original, attribute))
    if region.inner is None:
        entry.__wrapped__ = original  # type: ignore[attr-defined]
    else:
        try:
            signature = inspect.signature(original)
        except (TypeError, ValueError):
            return entry
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        entry.__signature__ = signature.replace(parameters=[owner, *signature.parameters.values()])  # type: ignore[attr-defined]
    return entry
