"""XLA on the CPU: two devices, and a skip with the reason where torch_xla is missing."""

from __future__ import annotations

import os
from pathlib import Path

import distckpt_backends
import pytest

# Read when torch_xla starts its runtime.
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("CPU_NUM_DEVICES", "2")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here is an XLA test."""
    reason = distckpt_backends.get("xla").why_unavailable()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xla)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
