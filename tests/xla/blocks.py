"""What the scripts of this folder train, and how they report gradients to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

LAYERS, BATCH, WIDTH, HIDDEN = 8, 256, 128, 512


class Block(nn.Module):
    """LayerNorm, a matrix product up, GELU, dropout, a matrix product down, residual.

    `fused=False` draws the mask with `torch.bernoulli`, which torch_xla's scan can carry.
    """

    def __init__(
        self, dropout: float, *, fused: bool = True, sizes: tuple[int, int] = (WIDTH, HIDDEN)
    ) -> None:
        super().__init__()
        width, hidden = sizes
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = dropout
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(self.norm(x)))
        if self.dropout and self.fused:
            h = F.dropout(h, self.dropout)
        elif self.dropout:
            keep = 1 - self.dropout
            h = h * torch.bernoulli(torch.full_like(h, keep)) / keep
        return x + self.down(h)


def bits(tensors: Iterable[torch.Tensor | None]) -> str:
    """A digest of every bit of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        assert tensor is not None
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def difference(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> float:
    """The largest difference between two lists of tensors, each relative to the largest value of its tensor."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))
