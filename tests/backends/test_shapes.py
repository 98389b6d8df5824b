"""MPS and TPU against stand-ins of their modules' shapes: what their own files do differently."""

from __future__ import annotations

import sys

import distckpt_backends
import pytest
import torch
import torch.nn.functional as F
from distckpt_backends.errors import BackendLoadError, DeviceError, NoRngError
from distckpt_backends.module import ModuleBackend
from distckpt_backends.mps import MpsBackend
from distckpt_backends.tpu import TpuBackend

from tests.fakes.module import FakeModule
from tests.fakes.shapes import AcceleratorShaped, MpsShaped, TpuShaped

ZERO = torch.device("lazy", 0)


def test_mps_stashes_all_44_bytes_and_restores_dropout(mps_shaped: MpsShaped) -> None:
    backend = distckpt_backends.get("lazy")
    state = backend.rng_stash(ZERO)
    assert type(state) is bytes
    assert len(state) == 44
    first = F.dropout(torch.ones(32, device=ZERO), 0.5)
    assert backend.rng_moved(ZERO, state)
    backend.rng_restore(ZERO, state)
    assert torch.equal(first, F.dropout(torch.ones(32, device=ZERO), 0.5))


def test_mps_is_live_although_its_module_cannot_say_so(mps_shaped: MpsShaped) -> None:
    assert not hasattr(mps_shaped, "_initialized")
    assert not hasattr(mps_shaped, "device")
    assert distckpt_backends.get("lazy").live_devices() == (ZERO,)
    assert distckpt_backends.get("lazy") in distckpt_backends.live()


def test_mps_counts_current_memory_and_has_no_peak(mps_shaped: MpsShaped) -> None:
    backend = distckpt_backends.get("lazy")
    stats = backend.memory(ZERO)
    assert stats is not None
    assert (stats.allocated, stats.reserved, stats.total) == (1 << 20, 1 << 22, 1 << 30)
    assert stats.peak_allocated is None
    assert "current memory only" in str(backend.capabilities.why("peak_memory"))


def test_the_real_mps_backend_says_why_it_is_absent() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    backend = MpsBackend()
    assert backend.why_unavailable()
    assert not backend.is_initialized()
    assert backend.live_devices() == ()
    with pytest.raises(DeviceError):
        backend.rng_stash(torch.device("mps", 0))


def test_the_real_mps_module_still_has_the_gaps_of_the_stand_in() -> None:
    shape = MpsShaped()
    for name in ("device", "_initialized", "is_initialized", "default_generators", "max_memory_allocated"):
        assert not hasattr(torch.mps, name), f"torch.mps.{name} exists now: use it"
        assert not hasattr(shape, name)
    for name in ("get_rng_state", "set_rng_state", "synchronize", "current_allocated_memory", "device_count"):
        assert hasattr(torch.mps, name)
        assert hasattr(shape, name)


def test_tpu_asks_the_accelerator_and_never_the_internal_names(tpu_shaped: TpuShaped) -> None:
    backend = distckpt_backends.get("lazy")
    with pytest.raises(RuntimeError, match="internal"):
        tpu_shaped.is_available()
    assert backend.is_available()
    assert backend.device_count() == 1
    assert backend.current_device() == ZERO
    backend.synchronize(ZERO)


def test_tpu_discovery_does_not_start_the_runtime(lazy: FakeModule) -> None:
    module = TpuShaped(initialized=False)
    backend = TpuBackend(module, AcceleratorShaped(), "lazy")
    assert backend.is_available()
    assert not backend.is_initialized()
    assert backend.live_devices() == ()
    with pytest.raises(DeviceError):
        backend.rng_stash(ZERO)
    assert not module.up


def test_tpu_is_absent_where_the_package_is_and_the_chip_is_not() -> None:
    backend = TpuBackend(TpuShaped(), AcceleratorShaped(present=False), "lazy")
    assert "finds no TPU" in str(backend.why_unavailable())
    assert backend.device_count() == 0


def test_tpu_is_absent_with_a_reason_on_this_machine() -> None:
    backend = distckpt_backends.get("tpu")
    if backend.is_available():
        pytest.skip("this machine has a TPU")
    assert backend.why_unavailable()
    assert not backend.is_initialized()
    assert backend not in distckpt_backends.live()
    if "torch.tpu" not in sys.modules:
        with pytest.raises(BackendLoadError, match=r"^\[DC206\] "):
            backend.barrier([torch.ones(1, device="meta")]) and backend._module  # type: ignore[attr-defined]


def test_tpu_ties_its_tensors_in_one_functional_barrier(tpu_shaped: TpuShaped) -> None:
    backend = distckpt_backends.get("lazy")
    x = torch.ones(2, device=ZERO, requires_grad=True)
    host = torch.ones(1)
    out = backend.barrier([x, host, torch.ones(3, device=ZERO)])
    assert tpu_shaped.barriers == [2]
    assert out[0] is not x
    assert out[1] is host
    out[0].sum().backward()
    assert torch.equal(x.grad.cpu(), torch.ones(2))  # type: ignore[union-attr]


def test_a_module_without_random_functions_serves_regions_that_draw_nothing() -> None:
    class Bare(MpsShaped):
        get_rng_state = set_rng_state = property()  # type: ignore[assignment]

    backend = ModuleBackend("lazy", Bare())
    assert not backend.capabilities.rng
    assert backend.barrier([torch.ones(1)])
    with pytest.raises(NoRngError, match=r"^\[DC207\] "):
        backend.rng_stash(ZERO)
