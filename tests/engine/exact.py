"""Programs that run once on plain autograd and once through regions, and are compared to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import distckpt as dc
from distckpt.engine.stats import counters

Region = Callable[..., Any]
Program = Callable[[Region], Sequence["torch.Tensor | None"]]


def plain(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """The call without a region."""
    return fn(*args, **kwargs)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal shape, dtype, device and bytes; NaN equals NaN, and 0.0 is not -0.0."""
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return bytes(a.flatten().view(torch.uint8).tolist()) == bytes(b.flatten().view(torch.uint8).tolist())


@dataclasses.dataclass
class Counts:
    """Regions recorded and replays run by one program."""

    regions: int
    replays: int


def counted(run: Callable[[], Any]) -> tuple[Any, Counts]:
    """``run()``, and how many regions and replays it took."""
    regions, replays = counters.regions, counters.replays
    out = run()
    return out, Counts(counters.regions - regions, counters.replays - replays)


def exact(program: Program, *, seed: int = 0, **options: Any) -> Counts:
    """Assert that ``program`` gives the same bits through regions; the generators end at the same place too."""
    torch.manual_seed(seed)
    expected = program(plain)
    end = torch.get_rng_state()
    torch.manual_seed(seed)
    found, counts = counted(lambda: program(functools.partial(dc.checkpoint, **options)))
    assert len(expected) == len(found)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert same_bits(a, b), f"result {i} differs: {a} and {b}"
    assert torch.equal(end, torch.get_rng_state()), "the generator did not end where plain autograd left it"
    return counts


def leaf(*shape: int, seed: int = 1, **options: Any) -> torch.Tensor:
    """A trainable tensor whose values depend on ``seed`` only."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, **options).requires_grad_()
