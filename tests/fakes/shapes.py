"""Modules shaped like torch.mps and torch_tpu, over fake devices: their names, their gaps, their refusals."""

from __future__ import annotations

import struct
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .generator import FakeGenerator


class MpsShaped(ModuleType):
    """torch.mps as of torch 2.13: 44 bytes of state, one device, no `device`, `default_generators`, `is_initialized`,
    `current_device`, `Stream`, `memory_allocated` or peak counter. `gets` and `sets` count reads and writes."""

    def __init__(self) -> None:
        super().__init__("torch.mps_shaped")
        self._generator = FakeGenerator(torch.device("lazy", 0))
        self.gets = self.sets = self.waits = 0
        self.Event = object

    def draw(self, index: int, numel: int) -> torch.Generator:
        return self._generator.draw(numel)

    def index(self, device: Any = None) -> int:
        return 0

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def get_rng_state(self, device: int | str | torch.device = "mps") -> torch.Tensor:
        self.gets += 1
        seed, offset = self._generator._seed, self._generator._offset
        words = [(seed >> 3 * i & 0xFFFFFFFF) ^ offset & 0xFFFFFFFF for i in range(7)]
        return torch.frombuffer(bytearray(struct.pack("<7IQQ", *words, seed, offset)), dtype=torch.uint8)

    def set_rng_state(self, new_state: torch.Tensor, device: int | str | torch.device = "mps") -> None:
        if new_state.numel() != 44:
            raise RuntimeError("RNG state is wrong size")
        self.sets += 1
        *_, self._generator._seed, self._generator._offset = struct.unpack("<7IQQ", bytes(new_state.tolist()))

    def synchronize(self) -> None:
        self.waits += 1

    def current_allocated_memory(self) -> int:
        return 1 << 20

    def driver_allocated_memory(self) -> int:
        return 1 << 22

    def recommended_max_memory(self) -> int:
        return 1 << 30


class TpuShaped:
    """torch.tpu of torch_tpu 0.2: what torch.accelerator also has raises for third parties; generators of one device;
    a functional barrier. `barriers` holds the number of tensors of each barrier."""

    def __init__(self, *, initialized: bool = True) -> None:
        self.up = initialized
        self.barriers: list[int] = []
        self._generators = (FakeGenerator(torch.device("lazy", 0)),)
        self.ops = SimpleNamespace(optimization_barrier=self._barrier)

    def draw(self, index: int, numel: int) -> torch.Generator:
        return self._generators[index].draw(numel)

    def index(self, device: Any = None) -> int:
        return 0

    def is_initialized(self) -> bool:
        import warnings

        warnings.warn("is_initialized() is experimental and subject to change", FutureWarning, stacklevel=2)
        return self.up

    @property
    def default_generators(self) -> tuple[FakeGenerator, ...]:
        self.up = True  # asking starts the runtime
        return self._generators

    def _internal(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("internal to TorchTPU; use torch.accelerator instead")

    is_available = device_count = current_device = set_device = synchronize = _internal
    get_rng_state = set_rng_state = _internal

    def _barrier(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.barriers.append(len(inputs))
        return [t.clone() for t in inputs]


class AcceleratorShaped:
    """torch.accelerator on a machine whose accelerator is `kind`; `present` False: the package without the chip."""

    def __init__(self, kind: str = "lazy", *, present: bool = True) -> None:
        self.kind, self.present, self.waits = kind, present, 0

    def current_accelerator(self, check_available: bool = False) -> torch.device | None:
        return torch.device(self.kind) if self.present or not check_available else None

    def device_count(self) -> int:
        return int(self.present)

    def current_device_index(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        self.waits += 1
