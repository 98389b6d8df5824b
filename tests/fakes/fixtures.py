"""Pytest fixtures of the fake devices; import the ones that a test module or a conftest.py needs."""

from __future__ import annotations

from collections.abc import Iterator

import distckpt_backends
import pytest
from distckpt_backends.mps import MpsBackend
from distckpt_backends.tpu import TpuBackend

from .install import install_lazy
from .module import FakeModule
from .shapes import AcceleratorShaped, MpsShaped, TpuShaped
from .tensor import OWNERS


@pytest.fixture
def lazy() -> Iterator[FakeModule]:
    """Device type `lazy`, two devices, in its first state."""
    module = install_lazy()
    module.reset()
    yield module
    module._initialized = False  # else every later test of this process would have a live accelerator


@pytest.fixture
def mps_shaped(lazy: FakeModule) -> Iterator[MpsShaped]:
    """Device type `lazy` behaves like MPS: one device, 44 bytes, nothing of torch.cuda's names."""
    module = MpsShaped()
    OWNERS["lazy"] = module
    distckpt_backends.register_backend("lazy", lambda: MpsBackend(module, "lazy"), replace=True)
    yield module
    distckpt_backends.unregister_backend("lazy")
    OWNERS["lazy"] = lazy


@pytest.fixture
def tpu_shaped(lazy: FakeModule) -> Iterator[TpuShaped]:
    """Device type `lazy` behaves like torch_tpu's device."""
    module = TpuShaped()
    OWNERS["lazy"] = module
    distckpt_backends.register_backend(
        "lazy", lambda: TpuBackend(module, AcceleratorShaped(), "lazy"), replace=True
    )
    yield module
    distckpt_backends.unregister_backend("lazy")
    OWNERS["lazy"] = lazy
