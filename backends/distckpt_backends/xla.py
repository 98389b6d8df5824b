"""XLA through torch_xla: operations are traced, compiled later, and random state is one host integer per
device."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch

from . import _torch
from .errors import BackendLoadError
from .protocol import Backend, Capabilities, MemoryStats
from .state import foreign
from .xla_seed import Loan

_REASONS = {
    "multi_device": "one XLA program runs on one device; tensors of another reach it through the host",
    "streams": "the compiler schedules; there are no streams to choose",
    "pinned_host": "transfers are part of the compiled program",
    "capture": "every XLA program is compiled as a whole already",
}
_NO_MEMORY = "the CPU runtime of PJRT does not count memory"


class XlaBackend(Backend):
    """torch_xla 2.9. Nothing here imports it until somebody asks whether XLA is available or uses a device.

    A state is an unsigned 64-bit int that moves when a random op is traced, so reading it neither compiles
    nor waits. Flushing the graph reseeds too: between a stash and rng_moved() there must be no sync.
    """

    device_type = "xla"

    def __init__(self) -> None:
        self._names: dict[torch.device, str] = {}  # checked devices
        self._loans: dict[torch.device, Loan] = {}
        self._live: tuple[torch.device, ...] = ()
        self._flags: Capabilities | None = None

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """Memory counts depend on the PJRT device, which is fixed once the runtime is up."""
        if self._flags is None:
            flags = self._read_flags()
            if not self.is_initialized():
                return flags
            self._flags = flags
        return self._flags

    def _read_flags(self) -> Capabilities:
        memory = _torch.pjrt_device() not in (None, "CPU")
        return Capabilities(
            rng=True,
            cheap_fingerprint=True,
            multi_device=False,
            streams=False,
            pinned_host=False,
            current_memory=memory,
            peak_memory=memory,
            deferred=True,
            capture=False,
            autocast=True,
            reasons={**_REASONS, "current_memory": _NO_MEMORY, "peak_memory": _NO_MEMORY},
        )

    # Discovery ----------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        if "torch_xla" not in sys.modules and find_spec("torch_xla") is None:
            return "torch_xla is not installed"
        try:
            _torch.xla_module()
        except Exception as error:  # a mismatched build raises ImportError, OSError or RuntimeError
            return f"torch_xla cannot be imported: {type(error).__name__}: {error}"
        return None

    def is_initialized(self) -> bool:
        return _torch.xla_is_initialized()

    def device_count(self) -> int:
        """0 also before the runtime is initialised: only it knows, and starting it would take the chip."""
        return len(self.live_devices())

    def live_devices(self) -> tuple[torch.device, ...]:
        if not self._live and self.is_initialized():
            self._live = tuple(torch.device(name) for name in _torch.xla_devices())
        return self._live

    def current_device(self) -> torch.device:
        self._import()
        return torch.device(_torch.xla_default_device())

    # Random state -------------------------------------------------------------------------------------

    def rng_stash(self, device: torch.device) -> int:
        return _torch.xla_get_seed(self._names.get(device) or self._name(device))

    def rng_seed(self, device: torch.device, seed: int) -> None:
        self.rng_restore(device, seed)

    def rng_restore(self, device: torch.device, state: int) -> None:
        name = self._names.get(device) or self._name(device)
        if type(state) is not int or not 0 <= state < 1 << 64:
            raise foreign("xla", "an unsigned 64-bit int", state)
        _torch.xla_set_seed(state, name)

    def rng_lend(self, device: torch.device) -> int:
        return self._loan(device).lend()

    def rng_take_back(self, device: torch.device, state: int) -> None:
        self._loan(device).take_back(state)

    def _loan(self, device: torch.device) -> Loan:
        loan = self._loans.get(device)
        if loan is None:
            loan = self._loans[device] = Loan(self._name(device))
        return loan

    def _name(self, device: torch.device) -> str:
        if not isinstance(device, torch.device) or device.type != "xla" or device not in self.live_devices():
            raise self._bad_device(device)
        self._names[device] = str(device)
        return self._names[device]

    # Memory and synchronisation -----------------------------------------------------------------------

    def memory(self, device: torch.device) -> MemoryStats | None:
        if not self.capabilities.current_memory:
            return None
        found: dict[str, Any] = _torch.xla_memory(self._name(device))
        return MemoryStats(
            found["bytes_used"], peak_allocated=found.get("peak_bytes_used"), total=found.get("bytes_limit")
        )

    def synchronize(self, device: torch.device | None = None) -> None:
        self._import()
        _torch.xla_sync(str(device) if device is not None else _torch.xla_default_device())

    # Compiled backends --------------------------------------------------------------------------------

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # torch_xla's barrier rewrites a tensor's graph node in place; a view has a node of its own, so only
        # the results are behind the barrier and the arguments stay what they were. A program has one device,
        # so each device gets its own barrier; tensors of other types pass through.
        out = list(tensors)
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for i, tensor in enumerate(out):
            if tensor.device.type == "xla":
                out[i] = tensor.view_as(tensor)
                by_device.setdefault(tensor.device, []).append(out[i])
        for group in by_device.values():
            _torch.xla_barrier(group)
        return out

    def one_by_one(self) -> AbstractContextManager[Any]:
        self._import()
        return _torch.xla_eager()

    def unit_among(self, modules: Iterable[torch.nn.Module]) -> str | None:
        unit = _torch.xla_fsdp_unit()
        if unit is not None:
            for root in modules:
                for name, module in root.named_modules():
                    if isinstance(module, unit):
                        return f"{unit.__name__} at {'.'.join(filter(None, (type(root).__name__, name)))}"
        return None

    def in_loop(self, thread: int) -> bool:
        return _torch.in_xla_scan(thread)

    def has_loop(self, nodes: Iterable[Any]) -> bool:
        return any(node.name() == _torch.XLA_SCAN_NODE for node in nodes)

    def _import(self) -> None:
        reason = self.why_unavailable()
        if reason is not None:
            raise BackendLoadError(
                "XLA was asked for and is not here", why=reason, fix="install the `xla` extra of distckpt"
            )
