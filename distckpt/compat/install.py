"""Installation: torch.utils.checkpoint's names resolve to ours, in code that nobody touches."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch.utils.checkpoint as torchs

from distckpt import compat
from distckpt._torch import is_aot_tracing, noop_context_fn
from distckpt.compat.checkpoint import _checkpoint_without_reentrant_generator

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

# Not in __all__, but imported by others, torch's composable API among them. Torch's own `checkpoint` looks the first
# one up by name, so it opens our regions even where somebody kept hold of it.
_GENERATOR = "_checkpoint_without_reentrant_generator"
_PRIVATE = (_GENERATOR, "_infer_device_type", "_get_autocast_kwargs")

_torchs_generator = getattr(torchs, _GENERATOR)

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

    Installations nest: each returns a handle, and the names go back when the last one is removed.
    """
    global _depth, _pairs, _seen
    with _lock:
        if _depth == 0:
            _seen = frozenset(sys.modules)
            _pairs = _replacements()
        _rebind()
        _depth += 1
        return Installed()


def _replacements() -> dict[int, tuple[Any, Any]]:
    """By identity of torch's object: that object and ours."""
    # An older torch lacks members of CheckpointPolicy. We accept torch's, and its compilers accept no other.
    names = [name for name in (*torchs.__all__, *_PRIVATE) if name != "CheckpointPolicy"]
    pairs = [(getattr(torchs, name, None), _ours(name)) for name in names]
    return {id(theirs): (theirs, ours) for theirs, ours in pairs if _replaceable(theirs, ours)}


def _replaceable(theirs: Any, ours: Any) -> bool:
    # Identity says something about functions, classes and registries only: never about interned strings and the like.
    return (
        theirs is not ours
        and None not in (theirs, ours)
        and (callable(theirs) or isinstance(theirs, (set, dict)))
    )


def _generator(
    fn: Any, preserve_rng_state: bool, context_fn: Any, *args: Any, **kwargs: Any
) -> Iterator[None]:
    """Ours, except for torch's own ``checkpoint`` on its way through AOTAutograd, which is traced as it is."""
    theirs = context_fn is not noop_context_fn and is_aot_tracing()
    make = _torchs_generator if theirs else _checkpoint_without_reentrant_generator
    return make(fn, preserve_rng_state, context_fn, *args, **kwargs)


def _ours(name: str) -> Any:
    if name == _GENERATOR:
        return _generator
    found = getattr(compat, name, None)
    if found is None or isinstance(found, ModuleType):
        found = getattr(sys.modules["distckpt.compat.checkpoint"], name, None)
    return found


def _rebind() -> None:
    for _, namespace in _namespaces():
        for name, value in list(namespace.items()):
            pair = _pairs.get(id(value))
            if pair is not None:
                namespace[name] = pair[1]
                _bindings.append((namespace, name, *pair))


def _put_back() -> None:
    ours = {id(mine): (mine, theirs) for _, _, theirs, mine in _bindings}
    sources = {namespace.get("__name__") for namespace, *_ in _bindings}
    for namespace, name, theirs, mine in reversed(_bindings):
        if namespace.get(name) is mine:
            namespace[name] = theirs
    _bindings.clear()
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
