"""Fixtures of the tests over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

import distckpt as dc
from distckpt.ranks import Coordinator
from tests.fakes.fixtures import lazy

__all__ = ["lazy", "no_stream_left_behind"]


@pytest.fixture(autouse=True)
def no_stream_left_behind() -> Iterator[None]:
    """A stream is process-wide: a test that forgets one would change every later test."""
    before = dc.rng.registered()
    yield
    assert dc.rng.registered() == before


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process is a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def coord(alone: None) -> Coordinator:
    """Its coordinator."""
    return Coordinator("cpu")
