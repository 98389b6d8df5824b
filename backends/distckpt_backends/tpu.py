"""TPU through torch_tpu: the second provider of the XLA family, a PrivateUse1 device named "tpu".

Written from the torch_tpu 0.2.0 wheel and run against a stand-in only: no TPU was at hand.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import BackendLoadError
from .generator import GeneratorBackend
from .protocol import Capabilities

_REASONS = {
    "multi_device": "torch_tpu gives a process one device",
    "streams": "streams of torch_tpu 0.2 do not wait for each other's events yet",
    "pinned_host": "without streams there is nothing to overlap a copy with",
    "current_memory": "no allocator counter of torch_tpu 0.2 has been verified",
    "peak_memory": "no allocator counter of torch_tpu 0.2 has been verified",
    "capture": "torch_tpu has no graph capture",
    "autocast": 'only the device type "tpu" is known to torch.autocast',
}


class TpuBackend(GeneratorBackend):
    """Generators as on CUDA, one device, and counts through torch.accelerator: torch_tpu's own raise for
    third parties.

    `module` and `accelerator` let stand-ins take the places of torch.tpu and torch.accelerator in tests.
    """

    def __init__(
        self, module: Any = None, accelerator: Any = torch.accelerator, device_type: str = "tpu"
    ) -> None:
        self.device_type = device_type
        self._given = module
        self._accelerator = accelerator
        self._offsets = True
        self._live = ()
        self._capture_check = None
        self.capabilities = Capabilities(
            rng=True,
            cheap_fingerprint=True,
            multi_device=False,
            streams=False,
            pinned_host=False,
            current_memory=False,
            peak_memory=False,
            deferred=True,
            capture=False,
            autocast=device_type == "tpu",
            reasons=_REASONS,
        )

    @property
    def _module(self) -> Any:  # type: ignore[override]
        module = self._given if self._given is not None else sys.modules.get("torch.tpu")
        if module is None:
            raise BackendLoadError(
                "TPU was asked for and is not here",
                why=self.why_unavailable(),
                fix="install torch_tpu on a machine with a TPU",
            )
        return module

    # Discovery ----------------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        if self._given is None and sys.modules.get("torch.tpu") is None:
            return "torch_tpu is not installed (torch has no module 'tpu')"
        # torch.tpu exists on machines without a TPU too, so only the accelerator's own answer counts
        try:
            found = self._accelerator.current_accelerator(check_available=True)
        except Exception as error:
            return f"torch.accelerator raised {type(error).__name__}: {error}"
        if found is None or found.type != self.device_type:
            return "torch_tpu is installed, and torch.accelerator finds no TPU"
        return None

    def is_initialized(self) -> bool:
        module = self._given if self._given is not None else sys.modules.get("torch.tpu")
        return module is not None and bool(_quiet(module.is_initialized))

    def device_count(self) -> int:
        return self._accelerator.device_count() if self.is_available() else 0

    def live_devices(self) -> tuple[torch.device, ...]:
        if not self._live and self.is_initialized():
            self._live = (self.current_device(),)
        return self._live

    def current_device(self) -> torch.device:
        return torch.device(self.device_type, self._accelerator.current_device_index())

    def device_guard(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def _generator(self, device: torch.device) -> Any:
        # asking for the generators starts the runtime, so that comes after the device was found to be live
        if device not in self.live_devices():
            raise self._bad_device(device)
        return _quiet(lambda: self._module.default_generators)[device.index]

    # Synchronisation and barrier ----------------------------------------------------------------------

    def synchronize(self, device: torch.device | None = None) -> None:
        self._accelerator.synchronize(self.current_device() if device is None else device)

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # torch_tpu defers and fuses by default, so equal computations are merged there as in XLA
        out = list(tensors)
        at = [i for i, t in enumerate(out) if t.device.type == self.device_type]
        if at:
            op = _quiet(lambda: self._module.ops.optimization_barrier)
            for i, tied in zip(at, _Barrier.apply(op, *[out[i] for i in at]), strict=True):
                out[i] = tied
        return out


class _Barrier(torch.autograd.Function):
    """The barrier for values, the identity for gradients; nothing says that torch_tpu's own has a
    derivative."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_quiet(lambda: op(list(tensors))))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *grads


def _quiet(call: Callable[[], Any]) -> Any:
    """Call without the warnings by which torch_tpu marks its experimental names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()
