"""The doctor's self-test on XLA devices: every one of them, bit by bit."""

from __future__ import annotations

import distckpt_backends
import torch

from distckpt.cli import selftest
from distckpt.cli.selftest import CASES


def test_every_case_is_equal_on_every_device() -> None:
    results = selftest.run_selftests([torch.device("cpu"), torch.device("xla")])
    devices = ["cpu", *map(str, distckpt_backends.get("xla").live_devices())]
    assert len(devices) >= 2
    assert [(r.device, r.status, r.detail) for r in results] == [
        (device, "equal", "") for device in devices for _ in range(2 * len(CASES))
    ]


def test_operations_run_one_by_one_only_inside() -> None:
    from torch_xla.experimental.eager import is_eager_mode

    backend = distckpt_backends.get("xla")
    before = is_eager_mode()
    with backend.one_by_one():
        assert is_eager_mode()
    assert is_eager_mode() is before
