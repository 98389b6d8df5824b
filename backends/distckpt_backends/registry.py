"""The table of device types: built-in files, the entry point group `distckpt.backends`, and torch's own
modules.

A backend is loaded when its type is first asked for. Looking at the table imports no torch_xla and
initialises no device runtime.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from . import _torch
from .errors import BackendLoadError, DuplicateBackendError, UnknownDeviceTypeError
from .protocol import Backend

Factory = Callable[[], Backend]

GROUP = "distckpt.backends"

BUILTIN = {
    "cpu": ("cpu", "CpuBackend"),
    "cuda": ("cuda", "CudaBackend"),
    "mps": ("mps", "MpsBackend"),
    "xla": ("xla", "XlaBackend"),
    "tpu": ("tpu", "TpuBackend"),
}

_lock = threading.RLock()
_backends: dict[str, Backend] = {}  # loaded, by device type
_factories: dict[str, Factory] = {}  # registered by code
_entries: dict[str, list[EntryPoint]] | None = None  # None until the first type that is not built in

_candidates: tuple[Backend, ...] = ()  # the non-CPU backends that could be initialised in this process
_scanned = -1  # len(sys.modules) at the last scan; a new module may bring a new device type
_modules = sys.modules


def get(device_type: str) -> Backend:
    """The backend of `device_type`, loaded on first use.

    Raises UnknownDeviceTypeError (DC201) when nothing provides one, DuplicateBackendError (DC202) when two
    distributions do, BackendLoadError (DC206) when the provider cannot be loaded.
    """
    try:
        return _backends[device_type]
    except KeyError:
        return _load(device_type)


def live() -> tuple[Backend, ...]:
    """The backends, CPU aside, whose runtime is initialised now; loads nothing that could not be."""
    if len(_modules) != _scanned:
        _scan()
    found: tuple[Backend, ...] = ()
    for backend in _candidates:
        if backend.is_initialized():
            found += (backend,)
    return found


def register_backend(device_type: str, factory: Factory, *, replace: bool = False) -> None:
    """Use `factory()` for `device_type` from now on, loaded at the first use.

    Raises DuplicateBackendError (DC202) when the type is built in or registered already and `replace` is
    False.
    """
    global _scanned
    with _lock:
        taken = device_type in _factories or device_type in BUILTIN
        if taken and not replace:
            raise DuplicateBackendError(
                f"there is a backend for device type {device_type!r} already",
                where=repr(_factories.get(device_type, f"built in ({__package__})")),
                fix="pass replace=True to use yours instead, or unregister_backend() the other first",
            )
        _factories[device_type] = factory
        _backends.pop(device_type, None)
        _scanned = -1


def unregister_backend(device_type: str) -> None:
    """Forget what register_backend() set for `device_type`; a built-in backend comes back. Unknown types are
    ignored."""
    global _scanned
    with _lock:
        _factories.pop(device_type, None)
        _backends.pop(device_type, None)
        _scanned = -1


def known_types() -> tuple[str, ...]:
    """Every device type that get() could be asked for here: built in, registered, of a package, or torch's
    own."""
    found = [*BUILTIN, *_factories, *_entry_table(), *_possible()]
    return tuple(dict.fromkeys(found))


def _possible() -> list[str]:
    """Types whose runtime could be initialised in this process."""
    found = [*_torch.compiled_types(), *_torch.registered_module_types()]
    private = _torch.private_use_name()
    if _torch.device_module(private) is not None:
        found.append(private)
    if "torch_xla" in _modules:
        found.append("xla")
    return found


def _scan() -> None:
    global _candidates, _scanned
    with _lock:
        count = len(_modules)
        found: list[Backend] = []
        for kind in dict.fromkeys([*_factories, *_possible()]):
            if kind == "cpu":
                continue
            try:
                found.append(get(kind))
            except (
                Exception
            ):  # get() raises it again to whoever uses the type; a scan must not fail for the others
                continue
        _candidates = tuple(found)
        # loading may have imported modules; those are of the table, not new device types
        _scanned = len(_modules) if len(_modules) == count else -1


def _load(device_type: str) -> Backend:
    with _lock:
        if device_type in _backends:
            return _backends[device_type]
        backend = _make(device_type)
        if backend.device_type != device_type:
            raise BackendLoadError(
                f"the backend registered for {device_type!r} says that it is for {backend.device_type!r}",
                where=repr(backend),
                fix="make its device_type attribute and the name of its registration the same",
            )
        _backends[device_type] = backend
        return backend


def _make(device_type: str) -> Backend:
    if device_type in _factories:
        return _called(_factories[device_type], f"register_backend({device_type!r}, ...)")
    if device_type in BUILTIN:
        file, name = BUILTIN[device_type]
        return getattr(import_module(f".{file}", __package__), name)()
    entries = _entry_table().get(device_type, [])
    if len(entries) > 1:
        raise DuplicateBackendError(
            f"several distributions provide a backend for device type {device_type!r}",
            where=" and ".join(sorted(_origin(e) for e in entries)),
            fix="uninstall all but one of them, or choose with register_backend()",
        )
    if entries:
        return _called(lambda: entries[0].load()(), _origin(entries[0]))
    return _generic(device_type)


def _generic(device_type: str) -> Backend:
    """A backend from the torch module of the type: generators if it has any, else its state functions."""
    module = _torch.device_module(device_type)
    if module is None:
        raise UnknownDeviceTypeError(
            f"no backend for device type {device_type!r}",
            why=f"it is not built in ({', '.join(BUILTIN)}), no installed package provides it "
            f"under {GROUP!r}, and torch.{device_type} does not exist",
            fix="import the package that provides the device, or register_backend() one of your own",
        )
    if hasattr(module, "default_generators"):
        from .generator import GeneratorBackend

        return GeneratorBackend(device_type, module)
    from .module import ModuleBackend

    return ModuleBackend(device_type, module)


def _called(factory: Callable[[], Any], origin: str) -> Backend:
    try:
        return factory()
    except Exception as error:
        raise BackendLoadError(
            "a backend could not be loaded", where=origin, why=f"{type(error).__name__}: {error}"
        ) from error


def _entry_table() -> dict[str, list[EntryPoint]]:
    global _entries
    if _entries is None:
        table: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=GROUP):
            table.setdefault(entry.name, []).append(entry)
        _entries = table
    return _entries


def _origin(entry: EntryPoint) -> str:
    dist = entry.dist
    return f"{dist.name} {dist.version} ({entry.value})" if dist is not None else entry.value
