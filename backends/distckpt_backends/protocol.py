"""The Backend protocol: what the engine asks of a device type.

Rules for implementers:

* Discovery (`why_unavailable`, `is_initialized`, `device_count`, `live_devices`) never raises and never
  initialises a runtime.
* RNG calls happen on the host: no device synchronisation, no kernel, no aten op that a dispatch mode could
  see.
* A state is opaque, belongs to the backend that made it, and is never changed after it was handed out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .errors import DeviceError

RngState = Any
"""Opaque random state of one device: a CPU tensor, bytes, an int or a tuple of ints. Picklable, host-side."""


@dataclass(frozen=True)
class Capabilities:
    """What a device type can do; every flag that is False has a reason in `reasons`."""

    rng: bool  # has a default generator that can be read and put back
    cheap_fingerprint: bool  # rng_moved() makes no tensor
    multi_device: bool  # one region may use several indices
    streams: bool  # side stream and events
    pinned_host: bool  # page-locked host memory
    current_memory: bool
    peak_memory: bool
    deferred: bool  # ops are traced and compiled later: needs barrier(), no eager offload
    capture: bool  # a device graph may be under capture
    autocast: bool
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        missing = [name for name, on in self.flags().items() if not on and not self.reasons.get(name)]
        if missing:
            raise ValueError(f"capability flags without a reason for being False: {', '.join(missing)}")

    def flags(self) -> dict[str, bool]:
        """Every flag by name, in declaration order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reasons"}

    def why(self, flag: str) -> str | None:
        """The reason why `flag` is False; None when it is True."""
        return None if getattr(self, flag) else self.reasons[flag]


@dataclass(frozen=True)
class MemoryStats:
    """Device memory in bytes; None where the device type does not count it."""

    allocated: int
    reserved: int | None = None
    peak_allocated: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class AutocastState:
    """Autocast of one device type, as found when a region was recorded."""

    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


class Backend:
    """One device type. Subclasses override what differs from a device without generators, streams or memory
    counts."""

    device_type: str
    capabilities: Capabilities

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.device_type}>"

    # Discovery ----------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        """Why this machine cannot use the device type; None when it can."""
        raise NotImplementedError

    def is_available(self) -> bool:
        """True when tensors can be put on this device type here."""
        return self.why_unavailable() is None

    def is_initialized(self) -> bool:
        """True when the runtime is up in this process, so that its generators may have been used."""
        raise NotImplementedError

    def device_count(self) -> int:
        """Number of devices; 0 when unavailable, and where only an initialised runtime can tell (XLA)."""
        raise NotImplementedError

    def live_devices(self) -> tuple[torch.device, ...]:
        """The devices whose generator may have been used in this process; empty before initialisation."""
        raise NotImplementedError

    def current_device(self) -> torch.device:
        """The device that factories without an index would use."""
        return torch.device(self.device_type, 0)

    def device_guard(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make `device` current inside the block; does nothing where only one device exists."""
        return nullcontext()

    # Random state -------------------------------------------------------------------------------------

    def rng_stash(self, device: torch.device) -> RngState:
        """The random state of `device`. Raises DeviceError (DC203), or GraphCaptureError (DC205) under
        capture."""
        raise NotImplementedError

    def rng_restore(self, device: torch.device, state: RngState) -> None:
        """Put `state` back exactly. A foreign state raises RngStateError (DC204) and changes nothing."""
        raise NotImplementedError

    def rng_seed(self, device: torch.device, seed: int) -> None:
        """Start the generator of `device` anew from `seed`, an unsigned 64-bit int."""
        with self.device_guard(device):
            torch.get_device_module(device.type).manual_seed(seed)

    def rng_moved(self, device: torch.device, state: RngState) -> bool:
        """True when anything was drawn on `device` since `state` was stashed (or the state was set
        elsewhere)."""
        return self.rng_stash(device) != state

    def rng_lend(self, device: torch.device) -> RngState:
        """`rng_stash` for a replay, which will restore other states and then give this one to `rng_take_back`."""
        return self.rng_stash(device)

    def rng_take_back(self, device: torch.device, state: RngState) -> None:
        """Put back what `rng_lend` gave, and whatever the device knows about its random numbers beyond that."""
        self.rng_restore(device, state)

    @contextmanager
    def rng_fork(self, devices: Iterable[torch.device] | None = None) -> Iterator[None]:
        """Put the random state of `devices` (default: the live ones) back on exit, also after an
        exception."""
        held = [(d, self.rng_lend(d)) for d in (self.live_devices() if devices is None else tuple(devices))]
        try:
            yield
        finally:
            for device, state in held:
                self.rng_take_back(device, state)

    def is_capturing(self, device: torch.device | None = None) -> bool:
        """True while the current stream of `device` records a device graph."""
        return False

    # Autocast -----------------------------------------------------------------------------------------

    def autocast_state(self) -> AutocastState | None:
        """Autocast of this device type now; None where autocast does not exist."""
        if not self.capabilities.autocast:
            return None
        kind = self.device_type
        return AutocastState(
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
        )

    def autocast_context(self, state: AutocastState | None) -> AbstractContextManager[Any]:
        """Re-enter `state`; does nothing for None."""
        if state is None:
            return nullcontext()
        return torch.autocast(
            self.device_type, dtype=state.dtype, enabled=state.enabled, cache_enabled=state.cache_enabled
        )

    # Memory, streams, synchronisation -----------------------------------------------------------------

    def memory(self, device: torch.device) -> MemoryStats | None:
        """Memory of `device` in bytes; None where it is not counted."""
        return None

    def reset_peak(self, device: torch.device) -> None:
        """Start the peak count anew; does nothing where there is none."""

    def side_stream(self, device: torch.device) -> Any | None:
        """A new stream of `device` beside the current one; None where streams do not exist."""
        return None

    def event(self, device: torch.device) -> Any | None:
        """A new event for `device`; None where events do not exist."""
        return None

    def synchronize(self, device: torch.device | None = None) -> None:
        """Wait until everything asked of `device` (default: the current one) is done; deferred backends flush
        first."""

    # Compiled backends --------------------------------------------------------------------------------

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tie the tensors together for the compiler: each result equals its input, and none can be computed,
        or merged with an equal computation, before all inputs exist. Functional; eager devices return the
        tensors themselves.
        """
        return list(tensors)

    def one_by_one(self) -> AbstractContextManager[Any]:
        """Inside, each operation is compiled and run alone, so that its rounding depends on nothing around it;
        eager devices are like that anyway. For self-tests that compare bits of two different programs."""
        return nullcontext()

    def unit_among(self, modules: Iterable[torch.nn.Module]) -> str | None:
        """What and where the first module is, among `modules` and those below, that a region cannot run on this device
        type; None when there is none. Only deferred backends are asked, once per region."""
        return None

    def in_loop(self, thread: int) -> bool:
        """Whether a thread, by its ident, is tracing a compiled loop that seeds random numbers in its own way."""
        return False

    def has_loop(self, nodes: Iterable[Any]) -> bool:
        """Whether such a loop is among these autograd nodes."""
        return False

    # For subclasses -----------------------------------------------------------------------------------

    def _bad_device(self, device: object) -> DeviceError:
        return DeviceError(
            f"{device!r} is not an indexed device of type {self.device_type!r}",
            why=f"this machine has {self.device_count()} device(s) of that type",
            fix="pass a torch.device with this type and an index below the count",
        )
