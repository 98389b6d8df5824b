"""Fixtures of the tests over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import distckpt as dc
from tests.fakes.fixtures import lazy

__all__ = ["lazy", "no_stream_left_behind"]


@pytest.fixture(autouse=True)
def no_stream_left_behind() -> Iterator[None]:
    """A stream is process-wide: a test that forgets one would change every later test."""
    before = dc.rng.registered()
    yield
    assert dc.rng.registered() == before
