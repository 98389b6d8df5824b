"""Pytest plugin of the processes with two fake types: installs both at once, before any backward can have run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .fixtures import lazy, mps_shaped
from .install import install_fake, install_lazy
from .module import FakeModule

install_fake()
install_lazy()


@pytest.fixture
def fake() -> Iterator[FakeModule]:
    """Device type `fake`, one device, in its first state."""
    module = install_fake()
    module.reset()
    yield module
    module._initialized = False


__all__ = ["fake", "lazy", "mps_shaped"]
