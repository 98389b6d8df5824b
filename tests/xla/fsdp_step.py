"""Two training steps of XlaFullyShardedDataParallel units on one replica; run by probe.py.

usage: fsdp_step.py none|regions|outside
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
    model: nn.Module = nn.Sequential(*(Block(0.1) for _ in range(LAYERS))).to(device)
    if variant == "regions":
        dc.apply(model, "*")
    model = nn.Sequential(*(XlaFullyShardedDataParallel(block) for block in model.children()))
    if variant == "outside":
        dc.apply(model, "*")
    model = XlaFullyShardedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(BATCH, WIDTH).to(device).requires_grad_()
    torch_xla.sync(wait=True)
    losses = []
    for step in range(2):
        torch_xla.manual_seed(7 + step)
        optimizer.zero_grad()
        x.grad = None
        try:
            loss = model(x).square().mean()
        except DistckptError as error:
            print(json.dumps({"code": error.code}))
            return
        loss.backward()
        optimizer.step()
        torch_xla.sync(wait=True)
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "bits": bits([x.grad, *model.parameters()])}))


if __name__ == "__main__":
    main(sys.argv[1])
