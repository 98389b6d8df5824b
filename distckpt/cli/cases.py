"""What the self-test replays: small functions, each with one thing that a replay could get wrong.

A case is called with a device and with ``region(fn, *args, **kwargs)``, which runs ``fn`` either plainly or as a
region. It returns a scalar and the tensors that count: leaves by their gradient, module state by its value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Region = Callable[..., Any]
Case = Callable[[torch.device, Region], tuple[torch.Tensor, list[torch.Tensor]]]

N = 16


def _leaf(device: torch.device, *shape: int) -> torch.Tensor:
    """Numbers that depend on nothing but the shape: a self-test must not hang on a device's generator."""
    count = int(torch.tensor(shape).prod())
    values = torch.sin(torch.arange(count, dtype=torch.float32) * 0.7).view(shape)
    return values.to(device).requires_grad_()


def _linear(device: torch.device, region: Region) -> Any:
    x, w = _leaf(device, N, N), _leaf(device, N, N)
    return region(lambda a: F.gelu(F.linear(F.gelu(F.linear(a, w)), w)), x).sum(), [x, w]


def _dropout(device: torch.device, region: Region) -> Any:
    x = _leaf(device, N, N)
    y = region(lambda a: F.dropout(torch.sin(a), 0.5) * a, x)
    return region(lambda a: F.dropout(torch.sin(a), 0.5) * a, y).sum(), [x]


def _attention(device: torch.device, region: Region) -> Any:
    q, k, v = (_leaf(device, 2, 2, 8, 8) for _ in range(3))
    return region(F.scaled_dot_product_attention, q, k, v, dropout_p=0.25, is_causal=True).sum(), [q, k, v]


def _autocast(device: torch.device, region: Region) -> Any:
    x, w = _leaf(device, N, N), _leaf(device, N, N)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = region(lambda a: torch.sigmoid(a @ w) @ w, x)
    return y.float().sum(), [x, w]


def _batch_norm(device: torch.device, region: Region) -> Any:
    norm = nn.BatchNorm1d(N).to(device)
    x = _leaf(device, 4, N)
    loss = region(lambda a: torch.tanh(norm(a)), x).square().sum()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return loss, [x, *norm.parameters(), norm.running_mean, norm.running_var]


def _nested(device: torch.device, region: Region) -> Any:
    x = _leaf(device, N, N)

    def inner(a: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.exp(-a * a), 0.25)

    return region(lambda a: region(inner, torch.sin(region(inner, a))), x).sum(), [x]


def _arguments(device: torch.device, region: Region) -> Any:
    x, w, b = _leaf(device, N, N), _leaf(device, N, N), _leaf(device, N)

    def fn(a: torch.Tensor, *, weight: torch.Tensor, rest: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(F.linear(a, weight, rest["bias"]))

    return region(functools.partial(fn, weight=w), x, rest={"bias": b}).sum(), [x, w, b]


AUTOCAST = "autocast to bfloat16"  # not every device type has it
CASES: dict[str, Case] = {
    "two linear layers": _linear,
    "dropout": _dropout,
    "attention with dropout": _attention,
    AUTOCAST: _autocast,
    "batch norm, in training": _batch_norm,
    "nested regions": _nested,
    "keywords and partials": _arguments,
}
