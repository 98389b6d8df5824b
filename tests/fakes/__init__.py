"""Fake accelerators for tests: no compiler, no hardware, real autograd, generators that move.

    from tests.fakes.fixtures import lazy              # noqa: F401   (in a conftest.py or in the test module)

    def test_two_devices(lazy):
        x = torch.randn(4, 8, device="lazy:1", requires_grad=True)
        u = torch.ones(4, 8, device="lazy:0")
        (torch.dropout(u, 0.5, True).to("lazy:1") * x).sum().backward()
        lazy.default_generators[0].get_offset()        # dropout on lazy:0 moved this one only

What there is:

* Device type `lazy`, two devices, torch 2.9 to 2.15. Factories, `.to()`, `nn.Module.to()`, dropout and the other
  random ops, views, in-place ops and backward work; mixing devices in one op raises as on real hardware. Every device
  has a CUDA-like generator (seed, offset) that any random op on it advances; `gets` and `sets` count how often its
  state was read and written. It is installed once per process and never removed.
* Device type `fake`, one device: PrivateUse1, torch >= 2.10. torch wants it installed before the first backward of the
  process, and it then counts as *the* accelerator for the whole of torch. So tests that need two types live in files
  named `pair_*.py`, which pytest does not collect by itself, and one ordinary test runs such a file in a process of its
  own: `run_pair_file(path)` from `tests.fakes.pair`. Inside, `lazy` and `fake` are fixtures, without an import.

Fixtures of `tests.fakes.fixtures`:

* `lazy` -> the device module (`torch.lazy`): generators freshly seeded, counters at zero, current device 0.
* `mps_shaped` -> a module with torch.mps's names and gaps, driving the same tensors while the test runs; the backend of
  `lazy` is then an MpsBackend over it.
* `tpu_shaped` -> the same for torch_tpu: queries raise as they do for third parties, functional barrier.

Simulated graph capture: `with lazy.capture(readable=True):` (torch >= 2.13) or `readable=False` (older torch).
"""

from __future__ import annotations

from .install import install_fake, install_lazy
from .tensor import DeviceTensor

__all__ = ["DeviceTensor", "install_fake", "install_lazy"]
