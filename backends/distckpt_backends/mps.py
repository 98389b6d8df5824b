"""MPS, Apple's GPUs: one device, a 44-byte state, no peak counter."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch

from .module import ModuleBackend
from .protocol import MemoryStats


class MpsBackend(ModuleBackend):
    """Stashes the whole device state: seven Philox words, which kernels use, then seed and offset.

    torch's engine never stashes it, as it looks for `torch.mps._initialized`, which does not exist. `module`
    and `device_type` let a stand-in of the same shape take torch.mps's place in tests.
    """

    _why: ClassVar[dict[str, str]] = {
        "cheap_fingerprint": "kernels use seven Philox words that the offset alone does not show",
        "multi_device": "MPS has one device",
        "streams": "torch.mps has no streams before torch 2.15, and its events know the default stream only",
        "pinned_host": "the GPU shares the host's memory",
        "peak_memory": "torch.mps counts current memory only",
        "capture": "torch.mps has no graph capture",
    }

    def __init__(self, module: ModuleType | None = None, device_type: str = "mps") -> None:
        super().__init__(device_type, torch.mps if module is None else module)
        now = self.capabilities
        self.capabilities = type(now)(
            **{
                **now.flags(),
                "multi_device": False,
                "streams": False,
                "pinned_host": False,
                "peak_memory": False,
            }
            | {"current_memory": hasattr(self._module, "current_allocated_memory")},
            reasons=now.reasons,
        )

    def why_unavailable(self) -> str | None:
        if self.device_type == "mps" and not torch.backends.mps.is_built():
            return "this torch was built without MPS"
        return super().why_unavailable()

    def memory(self, device: torch.device) -> MemoryStats | None:
        if not self.capabilities.current_memory:
            return None
        self._check(device)
        module: Any = self._module
        return MemoryStats(
            module.current_allocated_memory(),
            reserved=module.driver_allocated_memory(),
            total=module.recommended_max_memory(),
        )

    def synchronize(self, device: torch.device | None = None) -> None:
        self._module.synchronize()
