"""Bytes kept by regions: exact, each storage once, and nothing when nobody counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import distckpt as dc
from distckpt.cli.run import Tally, bytes_text


@pytest.fixture
def tally() -> Iterator[Tally]:
    counting = Tally()
    yield counting
    counting.stop()


def test_inputs_of_a_chain_are_summed_and_shared_storages_counted_once(tally: Tally) -> None:
    x = torch.ones(16, requires_grad=True)
    y = dc.checkpoint(torch.sin, x)  # keeps x: 64 bytes
    z = dc.checkpoint(torch.mul, y, y.view(4, 4).view(16))  # y once: 64 bytes
    dc.checkpoint(torch.sin, z[:2]).sum().backward()  # all of z's storage: 64 bytes
    counts = tally.stop()
    assert (counts.regions, counts.replays, counts.kept) == (3, 3, 192)


def test_it_is_the_fullest_moment_that_counts(tally: Tally) -> None:
    for _ in range(3):
        dc.checkpoint(torch.sin, torch.ones(16, requires_grad=True)).sum().backward()
    assert tally.stop().kept == 64


def test_parameters_are_kept_anyway_and_containers_are_looked_into(tally: Tally) -> None:
    w, x = torch.nn.Parameter(torch.ones(16)), torch.ones(16)
    dc.checkpoint(lambda a, rest: a * rest["x"], w, {"x": x}).sum().backward()
    assert tally.stop().kept == 64


def test_a_reentrant_region_counts_too(tally: Tally) -> None:
    x = torch.ones(16, requires_grad=True)
    dc.compat.checkpoint(torch.sin, x, use_reentrant=True).sum().backward()
    counts = tally.stop()
    assert (counts.regions, counts.replays, counts.kept) == (1, 1, 64)


def test_a_region_whose_function_raised_keeps_nothing(tally: Tally) -> None:
    def fail(a: torch.Tensor) -> torch.Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        dc.checkpoint(fail, torch.ones(16, requires_grad=True))
    dc.checkpoint(torch.sin, torch.ones(4, requires_grad=True)).sum().backward()
    assert tally.stop().kept == 64
    assert tally._kept == 0


def test_after_stop_nothing_is_counted() -> None:
    counting = Tally()
    before = counting.stop()
    dc.checkpoint(torch.sin, torch.ones(16, requires_grad=True)).sum().backward()
    assert before.kept == counting._peak == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**53, "8192.0 TiB")],
)
def test_bytes_are_said_in_units_of_1024(count: int, text: str) -> None:
    assert bytes_text(count) == text
