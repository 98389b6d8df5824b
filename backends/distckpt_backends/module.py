"""Device types whose torch module has `get_rng_state` and `set_rng_state` but no `default_generators`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from . import _torch
from .errors import BackendLoadError, NoRngError
from .protocol import Backend, Capabilities, MemoryStats
from .shape import capabilities_of, unavailable_reason
from .state import foreign, is_bytes, same_bytes


class ModuleBackend(Backend):
    """The state is the byte tensor of the module's functions. A module without them works for regions without RNG.

    Raises BackendLoadError (DC206) when torch has no module for the device type.
    """

    _why: dict[str, str] = {}

    def __init__(self, device_type: str, module: ModuleType | None = None) -> None:
        found = module if module is not None else _torch.device_module(device_type)
        if found is None:
            raise BackendLoadError(
                f"device type {device_type!r} has no module in torch",
                why=f"torch.{device_type} does not exist in this process",
                fix="import the package that provides the device first",
            )
        self.device_type = device_type
        self._module: Any = found
        self._live: tuple[torch.device, ...] = ()
        rng = hasattr(found, "get_rng_state") and hasattr(found, "set_rng_state")
        self.capabilities: Capabilities = capabilities_of(
            found, device_type, cheap=False, rng=rng, why=self._why
        )

    # Discovery ---------------------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        return unavailable_reason(self._module, self.device_type)

    def is_initialized(self) -> bool:
        # a module that cannot tell is taken to be initialised when it is available: reading its state then is safe,
        # and not reading it would be torch's silent mistake with MPS
        check = getattr(self._module, "is_initialized", None)
        return self.is_available() if check is None else bool(check())

    def device_count(self) -> int:
        return self._module.device_count() if self.is_available() else 0

    def live_devices(self) -> tuple[torch.device, ...]:
        if not self.is_initialized():
            return ()
        count = self.device_count()
        if count != len(self._live):
            self._live = tuple(torch.device(self.device_type, i) for i in range(count))
        return self._live

    def current_device(self) -> torch.device:
        current = getattr(self._module, "current_device", None)
        return torch.device(self.device_type, 0 if current is None else current())

    def device_guard(self, device: torch.device) -> AbstractContextManager[Any]:
        guard = getattr(self._module, "device", None)
        return nullcontext() if guard is None else guard(device.index)

    # Random state ------------------------------------------------------------------------------------------------

    def rng_stash(self, device: torch.device) -> torch.Tensor:
        self._check(device)
        # some modules hand out their live buffer; a stash must not move with the generator
        return self._module.get_rng_state(device.index).clone()

    def rng_moved(self, device: torch.device, state: torch.Tensor) -> bool:
        self._check(device)
        return not same_bytes(self._module.get_rng_state(device.index), state)

    def rng_restore(self, device: torch.device, state: torch.Tensor) -> None:
        self._check(device)
        size = self._module.get_rng_state(device.index).numel()
        if not is_bytes(state, size):
            raise foreign(self.device_type, f"{size} bytes in a uint8 CPU tensor", state)
        self._module.set_rng_state(state, device.index)

    def _check(self, device: torch.device) -> None:
        if not self.capabilities.rng:
            raise NoRngError(
                f"device type {self.device_type!r} has no random state that could be stashed",
                why=self.capabilities.reasons["rng"],
                fix="register_backend() one that knows how, or preserve_rng_state=False if nothing is drawn",
            )
        if device.type != self.device_type or device.index is None or device.index >= self.device_count():
            raise self._bad_device(device)

    # Memory, streams, synchronisation ----------------------------------------------------------------------------

    def memory(self, device: torch.device) -> MemoryStats | None:
        if not self.capabilities.current_memory:
            return None
        peak = self._module.max_memory_allocated(device.index) if self.capabilities.peak_memory else None
        return MemoryStats(self._module.memory_allocated(device.index), peak_allocated=peak)

    def reset_peak(self, device: torch.device) -> None:
        if self.capabilities.peak_memory:
            self._module.reset_peak_memory_stats(device.index)

    def side_stream(self, device: torch.device) -> Any | None:
        return self._module.Stream(device=device) if self.capabilities.streams else None

    def event(self, device: torch.device) -> Any | None:
        return self._module.Event() if self.capabilities.streams else None

    def synchronize(self, device: torch.device | None = None) -> None:
        wait = getattr(self._module, "synchronize", None)
        if wait is not None:
            wait() if device is None else wait(device.index)
