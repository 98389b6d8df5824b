"""Small models with dropout, importable by name so that they pickle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, name: str | None = None) -> torch.Tensor:
        return self.drop(self.norm(self.attn(x)).sin() * scale).cos() + x


class Model(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, 2.0, name="a kwarg that is also an option")
        return self.head(x)


def step(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Output, buffers and all gradients of one step from fixed seeds."""
    torch.manual_seed(1)
    x = torch.randn(4, 8, requires_grad=True)
    model.zero_grad()
    out = (model if call is None else call)(x)
    torch.manual_seed(2)  # a replay that leaned on the current random state would show
    out.sum().backward()
    gradients: list[Any] = [p.grad for p in model.parameters()]
    return [
        out.detach().clone(),
        *(b.clone() for b in model.buffers()),
        x.grad,
        *(g.clone() for g in gradients),
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Equal to the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
