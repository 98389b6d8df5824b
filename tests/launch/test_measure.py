"""Live bytes are counted exactly, so that the comparison's numbers can be trusted."""

from __future__ import annotations

import torch

from launch.measure import LiveBytes

UNIT = 1024 * 4  # bytes of `unit()`


def unit() -> torch.Tensor:
    return torch.zeros(1024)


def test_a_storage_counts_once_from_the_op_that_makes_it_until_it_dies() -> None:
    with LiveBytes() as live:
        a = unit()
        view = a[3:].view(-1)
        assert live.now() == UNIT
        b = a + 1
        assert live.now() == 2 * UNIT
        del a, b
        assert live.now() == UNIT  # the view holds it
        del view
    assert live.now() == 0
    assert live.peak == 2 * UNIT


def test_owned_tensors_count_from_the_start() -> None:
    a = unit()
    live = LiveBytes({"weight": a}, [a[1:]])
    assert live.now() == UNIT


def test_a_storage_counts_with_the_size_it_has_now() -> None:
    a = unit()
    with LiveBytes(a) as live:
        a.untyped_storage().resize_(0)
        assert live.now() == 0
        a.untyped_storage().resize_(2 * UNIT)
        assert live.now() == 2 * UNIT


def test_what_backward_needs_is_alive_after_forward() -> None:
    x = unit().requires_grad_()
    with LiveBytes(x) as live:
        y = x.exp().sin().exp()  # exp keeps its result and sin its input: x, the first result and y are left
        assert live.now() == 3 * UNIT
        y.sum().backward()
        assert x.grad is not None
        del y
        assert live.now() == 2 * UNIT
