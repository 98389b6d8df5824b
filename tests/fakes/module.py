"""What `torch.<device type>` offers for a fake device: the shape of torch.cuda without streams and memory counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

import torch

from .generator import DEFAULT_SEED, FakeGenerator


class FakeModule(ModuleType):
    """`count` devices of one type, each with a generator; one of them is current."""

    def __init__(self, kind: str, count: int) -> None:
        super().__init__(f"torch.{kind}")
        self.kind, self.count = kind, count
        self.default_generators = tuple(
            FakeGenerator(torch.device(kind, i), self.is_current_stream_capturing) for i in range(count)
        )
        self._current = 0
        self._initialized = True
        self._capturing: int | None = None  # the device whose stream records a graph
        self.waits = 0

    def reset(self) -> None:
        """Fresh generators' state, counters at zero, device 0 current."""
        self._current, self._initialized, self.waits = 0, True, 0
        for generator in self.default_generators:
            generator.manual_seed(DEFAULT_SEED)
            generator.gets = generator.sets = 0

    def draw(self, index: int, numel: int) -> torch.Generator:
        """The randomness of one op on device `index`."""
        return self.default_generators[index].draw(numel)

    def index(self, device: Any = None) -> int:
        """The index that `device` (None, an int, a string or a torch.device) means."""
        if device is None:
            return self._current
        if isinstance(device, int):
            return device
        found = torch.device(device).index
        return self._current if found is None else found

    @contextmanager
    def capture(self, *, readable: bool) -> Iterator[None]:
        """The current device's stream records a graph: counters are refused while that device is current, and byte
        states too unless `readable` (torch >= 2.13). Inside, the device's generator counts from the graph's start."""
        generator = self.default_generators[self._current]
        before = generator._seed, generator._offset
        self._capturing = self._current
        generator.registered, generator.readable, generator._offset = True, readable, 0
        try:
            yield
        finally:
            self._capturing = None
            generator.registered = generator.readable = False
            generator._seed, generator._offset = before

    # torch.cuda's names ----------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self._initialized

    def is_current_stream_capturing(self) -> bool:
        return self._capturing is not None and self._capturing == self._current

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return self._current

    def set_device(self, device: Any) -> None:
        self._current = self.index(device)

    def manual_seed(self, seed: int) -> None:
        self.default_generators[self._current].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.default_generators[self.index(device)].get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.default_generators[self.index(device)].set_state(state)

    def synchronize(self, device: Any = None) -> None:
        self.waits += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @property
    def device(self) -> type:
        """The context manager class that makes a device current."""
        module = self

        class _Guard:
            def __init__(self, device: Any) -> None:
                self.index = module.index(device)

            def __enter__(self) -> None:
                self.previous, module._current = module._current, self.index

            def __exit__(
                self,
                kind: type[BaseException] | None,
                error: BaseException | None,
                trace: TracebackType | None,
            ) -> None:
                module._current = self.previous

        return _Guard
