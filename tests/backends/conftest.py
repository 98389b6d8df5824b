"""Fixtures of the backend tests."""

from __future__ import annotations

import os

import distckpt_backends
import pytest

from tests.fakes.fixtures import lazy, mps_shaped, tpu_shaped

from .targets import FAKES, REAL, Target, real_target

# Read when torch_xla starts its runtime: two devices show that each one has a random state of its own.
os.environ.setdefault("CPU_NUM_DEVICES", "2")

__all__ = ["lazy", "mps_shaped", "tpu_shaped"]

_MARKS = {"xla": [pytest.mark.xla], "cuda": [pytest.mark.cuda]}


@pytest.fixture(params=[pytest.param(k, marks=_MARKS.get(k, [])) for k in (*REAL, *FAKES)])
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that this machine has, and every fake; absent ones skip with the reason."""
    kind = request.param
    if kind not in FAKES:
        return real_target(kind)
    request.getfixturevalue(kind)
    backend = distckpt_backends.get("lazy")
    return Target(backend, backend.live_devices())
