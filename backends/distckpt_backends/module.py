"""Device types whose torch module has `get_rng_state` and `set_rng_state` but no `default_generators`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, ClassVar

import torch

from . import _torch
from .errors import BackendLoadError, NoRngError
from .protocol import Backend, Capabilities, MemoryStats
from .shape import capabilities_of, unavailable_reason
from .state import foreign, read_bytes, write_bytes


class ModuleBackend(Backend):
    """The state is the bytes that the module's functions give. Without them only regions without RNG work.

    Raises BackendLoadError (DC206) when torch has no module for the device type.
    """

    _why: ClassVar[dict[str, str]] = {}

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
        self._seen = False  # found available once
        rng = hasattr(found, "get_rng_state") and hasattr(found, "set_rng_state")
        self.capabilities: Capabilities = capabilities_of(
            found, device_type, cheap=False, rng=rng, why=self._why
        )

    # Discovery ----------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        return unavailable_reason(self._module, self.device_type)

    def is_initialized(self) -> bool:
        # A module that cannot tell counts as initialised where it is available: reading its state is then
        # safe, and not reading it is how torch goes silently wrong with MPS.
        check = getattr(self._module, "is_initialized", None)
        if check is not None:
            return bool(check())
        self._seen = self._seen or self.is_available()
        return self._seen

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

    # Random state -------------------------------------------------------------------------------------

    def rng_stash(self, device: torch.device) -> bytes:
        self._check(device)
        # bytes, as some modules hand out their live buffer, and a stash must not move with the generator
        return read_bytes(self._module.get_rng_state(device.index))

    def rng_seed(self, device: torch.device, seed: int) -> None:
        self._check(device)
        with self.device_guard(device):
            self._module.manual_seed(seed)

    def rng_restore(self, device: torch.device, state: bytes) -> None:
        self._check(device)
        size = self._module.get_rng_state(device.index).numel()
        if type(state) is not bytes or len(state) != size:
            raise foreign(self.device_type, f"{size} bytes", state)
        try:
            self._module.set_rng_state(write_bytes(state), device.index)
        except RuntimeError as error:
            raise foreign(self.device_type, f"{size} bytes that its generator accepts", state) from error

    def _check(self, device: torch.device) -> None:
        if not self.capabilities.rng:
            raise NoRngError(
                f"device type {self.device_type!r} has no random state that could be stashed",
                why=self.capabilities.reasons["rng"],
                fix="register_backend() one that knows how, or preserve_rng_state=False if nothing is drawn",
            )
        if device.type != self.device_type or device.index is None or device.index >= self.device_count():
            raise self._bad_device(device)

    # Memory, streams, synchronisation -----------------------------------------------------------------

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
