"""Bytes that recomputed values occupy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.engine.region import Region
from distckpt.engine.sessions import Session
from distckpt.engine.stats import held, keys

from .exact import leaf


class Watch(Session):
    """A session that remembers its regions."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[Region] = []

    def enroll(self, region: Region) -> None:
        super().enroll(region)
        self.met.append(region)


def test_distinct_memory_counts_once_and_inputs_and_parameters_do_not() -> None:
    x, w = leaf(8, 8), torch.nn.Parameter(torch.randn(8, 8))

    def fn(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        h = (x * scale) @ w  # saves both inputs, the product, and a view of the parameter
        a, b = h.chunk(2, dim=1)  # two views of one piece of memory
        return a.sin() * b.sin()

    with Watch() as session:
        out = dc.checkpoint(fn, x, scale=leaf(8, 8, seed=3))
    (region,) = session.met
    assert held([region]) == 0
    session.replay()
    # the product, h, and two sines of half its size
    expected = 8 * 8 * 4 * 3
    assert held([region], keys([w])) == expected
    assert held([region]) == expected + 8 * 8 * 4
    out.sum().backward()
    assert held([region], keys([w])) == 0


def test_a_view_keeps_all_of_its_memory() -> None:
    x = leaf(1, 100)
    with Watch() as session:
        out = dc.checkpoint(lambda x: (x * 2)[:, :1].sin(), x)
    session.replay()
    assert held(session.met) == 400
    del out


def test_values_of_an_inner_region_are_not_counted_twice() -> None:
    x = leaf(8, 8)

    def outer(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()  # saves x, an input
        return dc.checkpoint(lambda h: h.sin().sin(), h).sin()

    with Watch() as session:
        out = dc.checkpoint(outer, x)
    session.replay()
    outer_region, inner_region = session.met
    assert (outer_region.inner, inner_region.inner) == (False, True)
    one = 8 * 8 * 4
    assert held([outer_region]) == 2 * one  # the inner region's input and its output
    assert held([inner_region]) == 2 * one  # its input is no memory of its own
    assert held(session.met) == 3 * one
    out.sum().backward()
    session.release()


def test_a_doubtful_value_counts() -> None:
    x = leaf(8, 8)
    with Watch() as session:
        out = dc.checkpoint(lambda x: F.dropout(x, 0.5), x)
    session.replay()
    assert held(session.met) == 8 * 8 * 4
    del out
