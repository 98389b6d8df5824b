"""A byte-level GPT whose blocks are regions: small enough to read in one go, and to train on two cores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256  # bytes

Region = Callable[..., torch.Tensor]
"""Runs `fn(*args)`, perhaps forgetting its activations: `region(fn, *args)`."""


def plain(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    """The region that keeps everything."""
    return fn(*args)


class Block(nn.Module):
    """Pre-norm attention and MLP over (batch, context, width), run as one region."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)
        self.region: Region = plain
        # Around what is dropped inside attention: a rank that has some of the heads draws from a stream of its own.
        self.own_heads: Callable[[], AbstractContextManager[None]] = nullcontext
        self.runs = 0  # executions of the body: one per forward, one more per replay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The region is inside the hooks that fully_shard puts around forward: a replay finds the unit's
        # parameters gathered already and gathers nothing itself. So does a region from dc.apply.
        return self.region(self._body, x)

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        x = x + self.drop(self._attention(self.norm1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, _ = x.shape
        # By heads, so that a share of the rows is a share of the heads; how many are here the rows tell.
        q, k, v = self.qkv(x).view(batch, context, -1, 3, self.head_width).permute(3, 0, 2, 1, 4)
        dropout = self.dropout if self.training else 0.0
        with self.own_heads():
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Bytes in, next-byte loss out."""

    def __init__(self, *, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per byte, a scalar; both arguments are int64 (batch, context)."""
        x = self.bytes(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Part(nn.Module):
    """Consecutive blocks of a GPT, from ``start`` up to ``stop``; the first part embeds, the last has the head.

    Names are those of the whole model.
    """

    def __init__(self, whole: GPT, start: int, stop: int, *, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.bytes = whole.bytes if self.first else None
        self.places = whole.places if self.first else None
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in range(start, stop)})
        self.norm = whole.norm if self.last else None
        self.head = whole.head if self.last else None

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes (first part) or channels in; channels, or after the last block logits in fp32, out. With ``targets``
        the last part gives the mean cross-entropy instead."""
        if self.bytes is not None and self.places is not None:
            x = self.bytes(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        if self.norm is None or self.head is None:
            return x
        logits = self.head(self.norm(x)).float()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def block_runs(model: nn.Module) -> int:
    """Executions of block bodies so far, replays included."""
    return sum(block.runs for block in model.modules() if isinstance(block, Block))
