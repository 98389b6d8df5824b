"""CPU: the Mersenne Twister of the default generator, and nothing to wait for.

Note [Generator memory]
    Reading a state through torch makes a tensor of 5056 bytes, and every region asks three times whether anybody
    has drawn. So the question is put to the memory that the generator keeps its state in: to its first bytes, which
    are seed, position and 32 of the 624 words, and to its last, which are the cached normals. Every draw moves the
    position or takes a cached normal, and a whole turn, after which the position is the same again, exchanges every
    word (Matsumoto and Nishimura, 1998). So equal bytes mean that nobody has drawn. To read less than all of it
    saves 2 to 3 us of a region. That memory is found by what it holds, right behind the start of the generator's own
    C++ object. The search reads through the kernel, which refuses an address that is not there instead of crashing.
    What it finds is only used after a generator of the same make has shown that every kind of draw changes it, the
    one that only takes the second number of a cached pair included, and that its last bytes are the generator's
    too. Otherwise, and where the environment says ``DISTCKPT_GENERATOR_MEMORY=0``, the state is read and compared.
    Bytes may differ although the state is equal (after a state was put back): that costs a look at the state, never
    a wrong answer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch

from ._torch import cpu_generator_memory
from .protocol import Backend, Capabilities
from .state import foreign, memcmp

_CPU = torch.device("cpu")
_LIVE = (_CPU,)

_default = torch.default_generator
_get_state = _default.get_state
_set_state = _default.set_state
_SIZE = _get_state().numel()  # 5056 bytes in every torch so far
_C_SIZE = ctypes.c_size_t(_SIZE)  # converted once: a tenth of a microsecond per compare


def _every_draw_shows() -> bool:
    """Whether the memory found for a generator changes with each draw from it, and with nothing else."""
    probe = torch.Generator().manual_seed(1)
    memory = cpu_generator_memory(probe)
    if memory is None:
        return False
    ends = set()
    for draw in (
        lambda: torch.empty(1).uniform_(generator=probe),
        lambda: torch.empty(1).normal_(generator=probe),
        lambda: torch.empty(1).normal_(generator=probe),  # of a cached pair
        lambda: torch.empty(1, dtype=torch.float64).normal_(generator=probe),
        lambda: torch.empty(1, dtype=torch.float64).normal_(generator=probe),
        lambda: torch.empty(624).uniform_(generator=probe),  # a whole turn: the position is the same again
        lambda: torch.randperm(4, generator=probe),
        lambda: probe.manual_seed(2),
    ):
        before = memory.read()
        ends.add(before[1][-8:])
        probe.get_state()
        if memory.moved(before):
            return False
        draw()
        if not memory.moved(before):
            return False
    return (
        len(ends) > 1
    )  # the last bytes say whether a number of a pair is cached; else they would be somebody else's


def _find_memory() -> Any | None:
    if os.environ.get("DISTCKPT_GENERATOR_MEMORY") == "0" or not _every_draw_shows():
        return None
    return cpu_generator_memory(_default)


_memory = _find_memory()


def _moved_since(mark: torch.Tensor) -> bool:
    now = _get_state()  # held until it is compared
    return memcmp(now.data_ptr(), mark.data_ptr(), _C_SIZE) != 0


# No function of our own around these: every region asks several times.
fingerprint: Callable[[], Any] = _get_state if _memory is None else _memory.read
"""What the default generator is at, for :func:`drawn_since`."""
drawn_since: Callable[[Any], bool] = _moved_since if _memory is None else _memory.moved
"""Whether the default generator has moved since a mark was its :func:`fingerprint`.

Also true after a state was put back, where bytes may differ although the state is equal.
"""


class CpuBackend(Backend):
    """The host. A state is the whole byte tensor: a shorter fingerprint misses some draws and the normal
    cache."""

    device_type = "cpu"
    capabilities = Capabilities(
        rng=True,
        cheap_fingerprint=False,
        multi_device=False,
        streams=False,
        pinned_host=False,
        current_memory=False,
        peak_memory=False,
        deferred=False,
        capture=False,
        autocast=True,
        reasons={
            "cheap_fingerprint": "the Mersenne Twister has no counter; the whole state is read and compared",
            "multi_device": "the host is one device",
            "streams": "operations on the host are done when they return",
            "pinned_host": "its memory is the host's already",
            "current_memory": "torch's CPU allocator does not count",
            "peak_memory": "torch's CPU allocator does not count",
            "deferred": "operations run when they are called",
            "capture": "there are no host graphs",
        },
    )

    def why_unavailable(self) -> str | None:
        return None

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def live_devices(self) -> tuple[torch.device, ...]:
        return _LIVE

    def current_device(self) -> torch.device:
        return _CPU

    def rng_stash(self, device: torch.device = _CPU) -> torch.Tensor:
        return _get_state()

    def rng_seed(self, device: torch.device, seed: int) -> None:
        _default.manual_seed(seed)

    def rng_moved(self, device: torch.device, state: torch.Tensor) -> bool:
        now = _get_state()
        return memcmp(now.data_ptr(), state.data_ptr(), _C_SIZE) != 0

    def rng_restore(self, device: torch.device, state: torch.Tensor) -> None:
        # torch takes two sizes, so the size is checked here; the rest it checks itself, before it writes
        # anything
        try:
            if state.numel() == _SIZE:
                _set_state(state)
                return
        except (RuntimeError, TypeError, AttributeError) as error:
            raise foreign("cpu", f"{_SIZE} bytes of a valid state in a uint8 CPU tensor", state) from error
        raise foreign("cpu", f"{_SIZE} bytes in a uint8 CPU tensor", state)
