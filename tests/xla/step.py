"""One training step of eight residual blocks on XLA; run by probe.py.

usage: step.py none|torch_xla|nonreentrant|reentrant [dropout]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_xla
from torch import nn

LAYERS, BATCH, WIDTH, HIDDEN = 8, 512, 256, 1024


class Block(nn.Module):
    """LayerNorm, a matrix product up, GELU, a matrix product down, residual."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(self.norm(x)))
        if self.dropout:
            h = F.dropout(h, self.dropout)
        return x + self.down(h)


def region(variant: str) -> Callable[[Block, torch.Tensor], torch.Tensor]:
    """How a block is called in this variant."""
    if variant == "none":
        return lambda block, x: block(x)
    if variant == "torch_xla":
        from torch_xla.utils.checkpoint import checkpoint as xla_checkpoint

        return xla_checkpoint
    import distckpt as dc

    reentrant = {"nonreentrant": False, "reentrant": True}[variant]
    return lambda block, x: dc.checkpoint(block, x, use_reentrant=reentrant)


def main(variant: str, dropout: bool) -> None:
    torch.manual_seed(0)
    device = torch_xla.device()
    torch_xla.manual_seed(7)
    blocks = nn.ModuleList(Block(0.1 if dropout else 0.0) for _ in range(LAYERS)).to(device)
    x = torch.randn(BATCH, WIDTH).to(device).requires_grad_()
    torch_xla.sync(wait=True)
    torch_xla.manual_seed(7)
    call = region(variant)
    h = x
    for block in blocks:
        h = call(block, h)
    loss = h.square().mean()
    del h
    loss.backward()
    torch_xla.sync(wait=True)
    grads = [x.grad, *(p.grad for p in blocks.parameters())]
    print(json.dumps({"loss": loss.item(), "gradient": sum(g.double().abs().sum().item() for g in grads)}))


if __name__ == "__main__":
    main(sys.argv[1], "dropout" in sys.argv[2:])
