"""Installation: torch.utils.checkpoint's names resolve to ours, in code that nobody touches."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint as torchs

from distckpt._torch import (
    GENERATOR,
    GENERATOR_IMPL,
    composable_checkpoint,
    is_aot_tracing,
    noop_context_fn,
    original_checkpoint,
    original_generators,
)
from distckpt.compat.checkpoint import (
    _checkpoint_without_reentrant_generator,
    _checkpoint_without_reentrant_generator_impl,
    checkpoint,
    checkpoint_sequential,
    get_device_states,
    set_device_states,
)
from distckpt.engine.reentrant import CheckpointFunction, check_backward_validity, detach_variable
from distckpt.engine.region import region_here, set_checkpoint_debug_enabled, set_checkpoint_early_stop
from distckpt.engine.rng import DefaultDeviceType
from distckpt.engine.sessions import GraphExecGroup
from distckpt.engine.stats import counters
from distckpt.errors import CheckpointError, TorchAnswers
from distckpt.policy.operators import SelectiveCheckpointContext
from distckpt.policy.sac import SAC_IGNORED_OPS, create_selective_checkpoint_contexts

# Read by name at each use, by Dynamo's identity test and torch's own operator among others: the compile stack
# follows torch.utils.checkpoint by itself, and what it bound at import (enum members, mode classes that its dispatch
# tables are keyed by) must stay what it is.
_LEFT_ALONE = (
    "distckpt",
    "distckpt_backends",
    "torch._dynamo",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._inductor",
)

# Not in __all__, but imported by others, torch's composable API among them. Torch's own `checkpoint` looks one of the
# generators up by name, so it opens our regions even where somebody kept hold of it.
_PRIVATE = (GENERATOR, GENERATOR_IMPL)

_Binding = tuple[dict[str, Any], str, Any, Any]  # namespace, name, torch's object, ours

_lock = threading.RLock()
_depth = 0
_pairs: dict[int, tuple[Any, Any]] = {}
_bindings: list[_Binding] = []
_seen: frozenset[str] = frozenset()


class Installed:
    """One :func:`install`. Usable as a context manager."""

    def __init__(self) -> None:
        self._active = True

    def remove(self) -> None:
        """Take this installation back; with the last one, every name is torch's again. Idempotent.

        A name that someone else has rebound since then stays as they left it. So does a region that was recorded
        meanwhile: it is replayed by the engine that recorded it.
        """
        global _depth
        with _lock:
            if not self._active:
                return
            self._active = False
            _depth -= 1
            if _depth == 0:
                _put_back()

    def replaced(self) -> tuple[str, ...]:
        """Dotted names that were bound to torch's objects and are bound to ours, those of torch's own modules first."""
        with _lock:
            names = [f"{namespace.get('__name__')}.{name}" for namespace, name, *_ in _bindings]
        return tuple(sorted(names, key=lambda name: (not name.startswith("torch."), name)))

    def lost(self) -> tuple[str, ...]:
        """Those of :meth:`replaced` that somebody has bound to something else since."""
        with _lock:
            return tuple(
                sorted(
                    f"{namespace.get('__name__')}.{name}"
                    for namespace, name, _, mine in _bindings
                    if namespace.get(name) is not mine
                )
            )

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Installed({'active' if self._active else 'removed'}, {len(_bindings)} names)"


def install() -> Installed:
    """Make the names of ``torch.utils.checkpoint`` resolve to ``distckpt.compat``, for code that does not know us.

    Replaced are the names in ``torch.utils.checkpoint`` itself and every global of an imported module that is bound
    to one of those objects (``from torch.utils.checkpoint import checkpoint``). Torch's wrapper modules and its
    composable API are among these, so they open our regions, also on modules that were wrapped before.
    Where torch's ``checkpoint`` is held elsewhere (a ``functools.partial`` or a default argument made before),
    the call still reaches our engine, except under ``torch.compile``, where it breaks the graph.

    Each call proves it: torch's own functions are called once, and each must open a region of ours.

    Installations nest: each returns a handle, and the names go back when the last one is removed.

    Raises:
        TorchAnswers: torch's engine answered in the proof; every name is as it was before the call (DC209).
    """
    global _depth, _pairs, _seen
    with _lock:
        if _depth == 0:
            _seen = frozenset(sys.modules)
            _pairs = _replacements()
        before = len(_bindings)
        _rebind()
        try:
            _prove()
        except BaseException:
            _put_back(before)
            raise
        _depth += 1
        return Installed()


def _prove() -> None:
    """Call torch's own functions once each, in a thread of its own, which has none of the caller's modes.

    Raises:
        TorchAnswers: one of them opened no region of ours.
    """
    unreached: dict[str, Exception | None] = {}

    def prove() -> None:
        x = torch.ones((), device="cpu", requires_grad=True)
        for name, call in _ways().items():
            inside: list[bool] = []

            def note(x: torch.Tensor, inside: list[bool] = inside) -> torch.Tensor:
                inside.append(region_here() is not None)
                return x * 1

            error = None
            try:
                call(note, x)
            except Exception as found:
                error = found
            counters.regions -= sum(inside)  # none that anybody asked for
            if error is not None or inside != [True]:
                unreached[name] = error

    thread = threading.Thread(target=prove, name="distckpt.install")
    thread.start()
    thread.join()
    if unreached:
        raise TorchAnswers(
            f"after compat.install(), torch's own engine still answers {', '.join(unreached)}",
            why=f"torch {torch.__version__} or another library leads these calls past the names that were replaced",
            fix="install before that library is imported, or use a torch that distckpt was tried on",
        ) from next(iter(unreached.values()))


def _ways() -> dict[str, Callable[[Any, torch.Tensor], Any]]:
    """Torch's own entries, as somebody who kept hold of them calls them."""
    # What torch wraps its function in would load Dynamo, which takes seconds and which none of our regions needs.
    theirs = original_checkpoint if "torch._dynamo" in sys.modules else inspect.unwrap(original_checkpoint)
    ways: dict[str, Callable[[Any, torch.Tensor], Any]] = {
        f"checkpoint(use_reentrant={reentrant})": lambda fn, x, reentrant=reentrant: theirs(
            fn, x, use_reentrant=reentrant, preserve_rng_state=False
        )
        for reentrant in (False, True)
    }
    composable = composable_checkpoint()
    if composable is not None:
        ways["_composable.checkpoint"] = lambda fn, x: composable(_Calls(fn), preserve_rng_state=False)(x)
    return ways


class _Calls(torch.nn.Module):
    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


def _replacements() -> dict[int, tuple[Any, Any]]:
    """By identity of torch's object: that object and ours."""
    # An older torch lacks members of CheckpointPolicy. We accept torch's, and its compilers accept no other.
    names = [name for name in (*torchs.__all__, *_PRIVATE) if name != "CheckpointPolicy"]
    pairs = [(getattr(torchs, name, None), _OURS.get(name)) for name in names]
    return {id(theirs): (theirs, ours) for theirs, ours in pairs if _replaceable(theirs, ours)}


def _replaceable(theirs: object, ours: object) -> bool:
    # Identity says something about functions, classes and registries only: never about interned strings and the like.
    return (
        theirs is not ours
        and None not in (theirs, ours)
        and (callable(theirs) or isinstance(theirs, (set, dict)))
    )


def _generator(
    fn: object,
    preserve_rng_state: bool = True,
    context_fn: object = noop_context_fn,
    *args: Any,
    **kwargs: Any,
) -> Iterator[None]:
    """Ours, except for torch's own ``checkpoint`` on its way through AOTAutograd, which is traced as it is."""
    theirs = context_fn is not noop_context_fn and is_aot_tracing()
    make = original_generators[GENERATOR] if theirs else _checkpoint_without_reentrant_generator
    return make(fn, preserve_rng_state, context_fn, *args, **kwargs)


def _generator_impl(
    fn: Any, args: Any, kwargs: Any, *, context_fn: Any = noop_context_fn, **options: Any
) -> Iterator[None]:
    """The same, as torch calls it from 2.14 on."""
    theirs = context_fn is not noop_context_fn and is_aot_tracing()
    make = original_generators[GENERATOR_IMPL] if theirs else _checkpoint_without_reentrant_generator_impl
    return make(fn, args, kwargs, context_fn=context_fn, **options)


_OURS: dict[str, Any] = {
    ours.__name__: ours
    for ours in (
        CheckpointError,
        CheckpointFunction,
        DefaultDeviceType,
        GraphExecGroup,
        SelectiveCheckpointContext,
        check_backward_validity,
        checkpoint,
        checkpoint_sequential,
        create_selective_checkpoint_contexts,
        detach_variable,
        get_device_states,
        set_checkpoint_debug_enabled,
        set_checkpoint_early_stop,
        set_device_states,
    )
} | {"SAC_IGNORED_OPS": SAC_IGNORED_OPS, GENERATOR: _generator, GENERATOR_IMPL: _generator_impl}


def _rebind() -> None:
    for _, namespace in _namespaces():
        for name, value in list(namespace.items()):
            pair = _pairs.get(id(value))
            if pair is not None:
                namespace[name] = pair[1]
                _bindings.append((namespace, name, *pair))


def _put_back(first: int = 0) -> None:
    """Undo the bindings from number ``first`` on; with all of them, also what modules imported meanwhile took."""
    undone = _bindings[first:]
    del _bindings[first:]
    for namespace, name, theirs, mine in reversed(undone):
        if namespace.get(name) is mine:
            namespace[name] = theirs
    if first:
        return
    ours = {id(mine): (mine, theirs) for _, _, theirs, mine in undone}
    sources = {namespace.get("__name__") for namespace, *_ in undone}
    for module, namespace in _namespaces():
        if module not in _seen and sources.intersection(_imports(module)):
            for name, value in list(namespace.items()):
                pair = ours.get(id(value))
                if pair is not None:
                    namespace[name] = pair[1]


def _imports(module: str) -> tuple[str, ...]:
    """Names that the top level of a module's code uses, the modules it imports from among them."""
    loader = getattr(getattr(sys.modules[module], "__spec__", None), "loader", None)
    try:
        return loader.get_code(module).co_names  # type: ignore[union-attr]
    except Exception:  # a loader may have no code to show, or fail in a way of its own: then nothing is known
        return ()


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not _left_alone(name):
            # Not vars(): a lazy module may answer attribute access by importing half of a package.
            yield name, object.__getattribute__(module, "__dict__")


def _left_alone(name: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in _LEFT_ALONE)
