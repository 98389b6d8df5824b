"""Device types whose torch module has `default_generators`: CUDA, ROCm, XPU, MTIA and renamed PrivateUse1
devices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from . import _torch
from .capture import CapturedState, crossed_capture, unreadable_capture
from .errors import BackendLoadError, DeviceError
from .protocol import Backend, Capabilities, MemoryStats, RngState
from .shape import capabilities_of, unavailable_reason
from .state import foreign, is_bytes, same_bytes


class GeneratorBackend(Backend):
    """A counter-based generator per device: (seed, offset) is both the stash and the fingerprint, without a
    tensor.

    Where a generator has no offset its byte state is used instead. Raises BackendLoadError (DC206) when torch
    has no module for the device type.
    """

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
        self._offsets = True  # until a generator says that it has none
        self._live: tuple[torch.device, ...] = ()
        self._capture_check = getattr(found, "is_current_stream_capturing", None)
        self.capabilities: Capabilities = capabilities_of(found, device_type, cheap=True)

    # Discovery ----------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        return unavailable_reason(self._module, self.device_type)

    def is_initialized(self) -> bool:
        check = getattr(self._module, "is_initialized", None)
        return bool(self._module.default_generators) if check is None else check()

    def device_count(self) -> int:
        return self._module.device_count() if self.is_available() else 0

    def live_devices(self) -> tuple[torch.device, ...]:
        if not self.is_initialized():
            return ()
        count = len(self._module.default_generators)
        if count != len(self._live):
            self._live = tuple(torch.device(self.device_type, i) for i in range(count))
        return self._live

    def current_device(self) -> torch.device:
        return torch.device(self.device_type, self._module.current_device())

    def device_guard(self, device: torch.device) -> AbstractContextManager[Any]:
        guard = getattr(self._module, "device", None)
        return nullcontext() if guard is None else guard(device.index)

    # Random state -------------------------------------------------------------------------------------

    def rng_stash(self, device: torch.device) -> RngState:
        generator = self._generator(device)
        if self._capture_check is not None and self._capture_check():
            # The stream that records may be another device's; only under this device's guard can one tell.
            with self.device_guard(device):
                if self._capture_check():
                    return CapturedState.read(generator)
                return self._read(generator)
        return self._read(generator)

    def _read(self, generator: Any) -> RngState:
        if self._offsets:
            try:
                return generator.initial_seed(), generator.get_offset()
            except (RuntimeError, NotImplementedError, AttributeError):
                self._offsets = False
        return generator.get_state()

    def rng_moved(self, device: torch.device, state: RngState) -> bool:
        if type(state) is CapturedState and not state.readable:
            raise unreadable_capture(device)
        now = self.rng_stash(device)
        if type(now) is CapturedState and type(state) is CapturedState:
            return not now.same(state)
        if isinstance(now, torch.Tensor) and isinstance(state, torch.Tensor):
            return not same_bytes(now, state)
        return type(now) is not type(state) or now != state

    def rng_seed(self, device: torch.device, seed: int) -> None:
        self._generator(device).manual_seed(seed)

    def rng_restore(self, device: torch.device, state: RngState) -> None:
        generator = self._generator(device)
        if self._capture_check is not None and self._capture_check():
            with self.device_guard(device):
                self._write(generator, device, state, self._capture_check())
        else:
            self._write(generator, device, state, False)

    def _write(self, generator: Any, device: torch.device, state: RngState, capturing: bool) -> None:
        if type(state) is CapturedState:
            if not capturing:
                raise crossed_capture(device, capturing)
            state.write(generator, device)
        elif isinstance(state, torch.Tensor):
            if capturing:
                raise crossed_capture(device, capturing)
            self._restore_bytes(generator, state)
        elif _is_counter(state):
            if capturing:
                raise crossed_capture(device, capturing)
            self._restore_counter(generator, state)
        else:
            raise foreign(self.device_type, "(seed, offset) with an offset that is a multiple of 4", state)

    def _restore_counter(self, generator: Any, state: tuple[int, int]) -> None:
        seed, offset = state
        before = generator.initial_seed(), generator.get_offset()
        try:
            if before[0] != seed:
                generator.manual_seed(seed)
            generator.set_offset(offset)
        except RuntimeError as error:
            generator.manual_seed(before[0])
            generator.set_offset(before[1])
            raise foreign(self.device_type, "(seed, offset) that the generator accepts", state) from error

    def _restore_bytes(self, generator: Any, state: torch.Tensor) -> None:
        size = generator.get_state().numel()
        if not is_bytes(state, size):
            raise foreign(self.device_type, f"{size} bytes in a uint8 CPU tensor", state)
        generator.set_state(state)

    def is_capturing(self, device: torch.device | None = None) -> bool:
        return self._capture_check is not None and self.is_initialized() and bool(self._capture_check())

    def _generator(self, device: torch.device) -> Any:
        if device.type == self.device_type:
            try:
                return self._module.default_generators[device.index]
            except (IndexError, TypeError):
                pass
        if device.type == self.device_type and device.index is not None and not self.is_initialized():
            raise DeviceError(
                f"{device} has no random state yet: the {self.device_type} runtime is not initialised",
                fix="use the device once (create a tensor on it) before the region",
            )
        raise self._bad_device(device)

    # Memory, streams, synchronisation -----------------------------------------------------------------

    def memory(self, device: torch.device) -> MemoryStats | None:
        if not self.capabilities.current_memory:
            return None
        module, index = self._module, device.index
        peak = module.max_memory_allocated(index) if self.capabilities.peak_memory else None
        reserved = getattr(module, "memory_reserved", None)
        describe = getattr(module, "get_device_properties", None)
        total = getattr(describe(index), "total_memory", None) if describe is not None else None
        return MemoryStats(
            module.memory_allocated(index), reserved(index) if reserved is not None else None, peak, total
        )

    def reset_peak(self, device: torch.device) -> None:
        if self.capabilities.peak_memory:
            self._module.reset_peak_memory_stats(device.index)

    def side_stream(self, device: torch.device) -> Any | None:
        return self._module.Stream(device=device) if self.capabilities.streams else None

    def event(self, device: torch.device) -> Any | None:
        if not self.capabilities.streams:
            return None
        with self.device_guard(device):
            return self._module.Event()

    def synchronize(self, device: torch.device | None = None) -> None:
        wait = getattr(self._module, "synchronize", None)
        if wait is not None:
            wait() if device is None else wait(device.index)


def _is_counter(state: object) -> bool:
    if type(state) is not tuple or len(state) != 2:
        return False
    seed, offset = state
    return (
        type(seed) is int and type(offset) is int and 0 <= seed < 1 << 64 and offset >= 0 and offset % 4 == 0
    )
