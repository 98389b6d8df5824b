"""Torch's helpers for device random state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distckpt import compat
from tests.fakes.fixtures import lazy
from tests.fakes.module import FakeModule

__all__ = ["lazy"]


@pytest.fixture
def default_type() -> Iterator[None]:
    before = compat.DefaultDeviceType._type
    yield
    compat.DefaultDeviceType._type = before


def test_cpu_tensors_have_no_device_states() -> None:
    assert compat.get_device_states(torch.ones(2), 3, "x", [torch.ones(1)]) == ([], [])


def test_each_device_is_read_once_also_in_nested_containers(lazy: FakeModule) -> None:
    one, two = torch.ones(2, device="lazy:1"), torch.ones(2, device="lazy:1")
    devices, states = compat.get_device_states(one, [two, {"x": torch.ones(2, device="lazy:0")}])
    assert devices == [1, 0]
    assert len(states) == 2


def test_states_put_back_make_the_device_draw_the_same_again(lazy: FakeModule) -> None:
    x = torch.ones(2, device="lazy:1")
    devices, states = compat.get_device_states(x)
    first = torch.rand(4, device="lazy:1").cpu()
    torch.rand(4, device="lazy:1")
    compat.set_device_states(devices, states, device_type="lazy")
    assert torch.equal(torch.rand(4, device="lazy:1").cpu(), first)


def test_without_a_device_type_the_default_one_is_used(lazy: FakeModule, default_type: None) -> None:
    compat.DefaultDeviceType.set_device_type("lazy")
    assert compat.DefaultDeviceType.get_device_type() == "lazy"
    devices, states = compat.get_device_states(torch.ones(2, device="lazy:0"))
    first = torch.rand(4, device="lazy:0").cpu()
    compat.set_device_states(devices, states)
    assert torch.equal(torch.rand(4, device="lazy:0").cpu(), first)


def test_nothing_to_put_back_needs_no_device() -> None:
    compat.set_device_states([], [])
    compat.set_device_states([0], [None], device_type="meta")
