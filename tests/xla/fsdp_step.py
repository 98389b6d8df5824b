"""Two training steps of XlaFullyShardedDataParallel units on one replica; run by probe.py.

usage: fsdp_step.py none|regions
"""

from __future__ import annotations

import json
import sys

import torch
import torch_xla
from distckpt_backends.errors import DistckptError
from torch import nn
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

import distckpt as dc
from tests.xla.blocks import BATCH, LAYERS, WIDTH, Block, bits


def main(variant: str) -> None:
    torch.manual_seed(0)
    device = torch_xla.device()
    blocks: nn.Module = nn.Sequential(*(Block(0.1) for _ in range(LAYERS))).to(device)
    if variant == "regions":
        dc.apply(blocks, "*")
    units = nn.Sequential(*(XlaFullyShardedDataParallel(block) for block in blocks.children()))
    model = XlaFullyShardedDataParallel(units)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(BATCH, WIDTH).to(device).requires_grad_()
    torch_xla.sync(wait=True)
    losses = []
    torch_xla.manual_seed(7)
    for _ in range(2):
        optimizer.zero_grad()
        x.grad = None
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        torch_xla.sync(wait=True)
        losses.append(loss.item())
    found = {"losses": losses, "bits": bits([x.grad, *model.parameters()])}
    print(json.dumps({**found, "around": around(units[0], x)}))


def around(unit: nn.Module, x: torch.Tensor) -> str:
    """The code with which a region around a unit is refused."""
    try:
        dc.checkpoint(unit, x)
    except DistckptError as error:
        return error.code
    return "none"


if __name__ == "__main__":
    main(sys.argv[1])
