"""One training step of layers that torch_xla's scan runs; run by probe.py.

usage: scan_step.py none|regions
"""

from __future__ import annotations

import json
import sys

import torch
import torch_xla
from torch import nn
from torch_xla.experimental.scan_layers import scan_layers

import distckpt as dc
from tests.xla.blocks import BATCH, LAYERS, WIDTH, Block, bits


def main(variant: str) -> None:
    torch.manual_seed(0)
    device = torch_xla.device()
    layers = nn.ModuleList(Block(0.1, fused=False) for _ in range(LAYERS)).to(device)
    if variant == "regions":
        dc.apply(layers, "*")
    x = torch.randn(BATCH, WIDTH).to(device).requires_grad_()
    torch_xla.sync(wait=True)
    torch_xla.manual_seed(7)
    loss = scan_layers(layers, x).square().mean()
    loss.backward()
    torch_xla.sync(wait=True)
    print(json.dumps({"loss": loss.item(), "bits": bits([x.grad, *(p.grad for p in layers.parameters())])}))


if __name__ == "__main__":
    main(sys.argv[1])
