"""What the contract suite runs against: every real device type of the machine, and the fakes."""

from __future__ import annotations

from dataclasses import dataclass

import distckpt_backends
import pytest
import torch
from distckpt_backends import Backend

REAL = ("cpu", "cuda", "mps", "xla", "tpu", "xpu", "mtia")
FAKES = ("lazy", "mps_shaped", "tpu_shaped")


@dataclass
class Target:
    """A backend under test and its devices here."""

    backend: Backend
    devices: tuple[torch.device, ...]

    def draw(self, index: int = 0) -> torch.Tensor:
        """A few numbers from device `index`, on the host."""
        return torch.rand(8, device=self.devices[index]).cpu()


def real_target(kind: str) -> Target:
    """The machine's devices of a real type; skips with the reason where there are none."""
    try:
        backend = distckpt_backends.get(kind)
    except distckpt_backends.DistckptError as error:
        pytest.skip(f"{kind}: {error}")
    reason = backend.why_unavailable()
    if reason is not None:
        pytest.skip(f"{kind}: {reason}")
    torch.empty(1, device=kind)  # brings the runtime up
    return Target(backend, backend.live_devices())
