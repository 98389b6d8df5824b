"""The table of docs/semantics.md: state that a replay reads as it is by then, and which check level sees a change."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import distckpt as dc
from distckpt.errors import ValueMismatch

from .exact import leaf

Row = Callable[[Any, torch.Tensor], torch.Tensor]


def bias(region: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    out = region(lambda t: layer(t).sin(), x)
    layer.bias.data.add_(1.0)  # moves no version, and the memory stays
    return out


def container_held_by_a_name(region: Any, x: torch.Tensor) -> torch.Tensor:
    scales = [2.0]
    out = region(lambda t: (t * scales[0]).sin(), x)
    scales[0] = 3.0
    return out


def attribute(region: Any, x: torch.Tensor) -> torch.Tensor:
    config = types.SimpleNamespace(scale=2.0)
    out = region(lambda t, c: (t * c.scale).sin(), x, config)
    config.scale = 3.0
    return out


def iterator(region: Any, x: torch.Tensor) -> torch.Tensor:
    def fn(t: torch.Tensor, scales: Iterator[float]) -> torch.Tensor:
        return (t * next(scales)).sin()

    return region(fn, x, iter([2.0, 3.0]))


def unregistered_source(region: Any, x: torch.Tensor) -> torch.Tensor:
    random.seed(0)
    return region(lambda t: (t + random.random()).sin(), x)


def function_mode(region: Any, x: torch.Tensor) -> torch.Tensor:
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.Tensor.exp else out

    with Doubled():
        return region(lambda t: t.exp().sin(), x)


ROWS: dict[str, Row] = {
    "a parameter written through .data": bias,
    "a list that a name holds": container_held_by_a_name,
    "an attribute of an object": attribute,
    "an iterator": iterator,
    "a source that is not registered": unregistered_source,
    "a function mode of the forward only": function_mode,
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("level", ["none", "default", "fingerprint", "bitwise"])
def test_which_check_level_sees_state_that_changed_before_the_replay(row: str, level: str) -> None:
    def region(fn: Any, *args: Any) -> Any:
        return dc.checkpoint(fn, *args, determinism_check=level)

    x = leaf(4)
    out = ROWS[row](region, x)
    if level in ("fingerprint", "bitwise"):
        with pytest.raises(ValueMismatch):
            out.sum().backward()
        return
    out.sum().backward()
    y = leaf(4)
    ROWS[row](lambda fn, *args: fn(*args), y).sum().backward()
    assert not torch.equal(x.grad, y.grad)
