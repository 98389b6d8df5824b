"""A counter-based generator like CUDA's: (seed, offset), 16 bytes of state, graph capture with a relative offset."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch

DEFAULT_SEED = 67280421310721


class FakeGenerator:
    """The default generator of one fake device. `gets` and `sets` count reads and writes of its state.

    `capturing` tells whether the *current* stream records a graph, as CUDA's generators ask; `registered` is whether
    that graph knows this generator, and `readable` whether this torch gives its state then.
    """

    def __init__(self, device: torch.device, capturing: Callable[[], bool] = lambda: False) -> None:
        self.device = device
        self.gets = self.sets = 0
        self.capturing = capturing
        self.registered = self.readable = False
        self._seed, self._offset = DEFAULT_SEED, 0

    def initial_seed(self) -> int:
        self._refuse("current_seed")
        return self._seed

    def manual_seed(self, seed: int) -> FakeGenerator:
        self._refuse("set_current_seed")
        self._seed, self._offset = int(seed) & (1 << 64) - 1, 0
        return self

    def get_offset(self) -> int:
        self._refuse("get_offset")
        self.gets += 1
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._refuse("set_offset")
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self.sets += 1
        self._offset = offset

    def get_state(self) -> torch.Tensor:
        self._refuse("current_seed", unless=self.registered and self.readable)
        self.gets += 1
        return torch.frombuffer(bytearray(struct.pack("<QQ", self._seed, self._offset)), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        self._refuse("set_state", unless=self.registered and self.readable)
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self.sets += 1
        self._seed, self._offset = struct.unpack("<QQ", bytes(state.tolist()))

    def draw(self, numel: int) -> torch.Generator:
        """A CPU generator for one op of `numel` elements at the present counter, which then moves on."""
        source = torch.Generator().manual_seed((self._seed * 1000003 + self._offset * 7919) & (1 << 63) - 1)
        self._offset += (numel + 3) // 4 * 4
        return source

    def _refuse(self, name: str, *, unless: bool = False) -> None:
        if self.capturing() and not unless:
            raise RuntimeError(f"Cannot call FakeGenerator::{name} during graph capture")
