"""Random programs with regions give the outputs, gradients and generator state of plain autograd, to the bit.

The draw is fixed by its seed, so a run is repeatable. ``python benchmarks/compose.py`` draws 10,000.
"""

from __future__ import annotations

import pytest

from .engines import engine
from .sweep import Tally, sweep


@pytest.mark.parametrize("start", range(4))
def test_dc_regions_equal_plain_autograd(start: int) -> None:
    tally = Tally()
    sweep(engine("dc"), 80, start, tally)
    assert tally.verdicts["equal"] >= 40


@pytest.mark.parametrize("start", range(2))
def test_compat_regions_equal_plain_autograd(start: int) -> None:
    tally = Tally()
    sweep(engine("compat"), 75, 100 + start, tally)
    assert tally.verdicts["equal"] >= 40


def test_torch_regions_equal_plain_autograd_so_the_suite_itself_is_sound() -> None:
    tally = Tally()
    sweep(engine("torch"), 48, 200, tally)
    assert tally.verdicts["equal"] >= 25  # its replays read names and exchanged parameters late
