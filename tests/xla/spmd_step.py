"""One training step of FSDPv2 units over a mesh of every device; run by probe.py.

usage: spmd_step.py none|regions [dropout]
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn
from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel

import distckpt as dc
from tests.xla.blocks import BATCH, LAYERS, WIDTH, Block, bits


def main(variant: str, dropout: float) -> None:
    xr.use_spmd()
    count = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(count), (count, 1), ("fsdp", "model"))
    torch.manual_seed(0)
    device = torch_xla.device()
    model: nn.Module = nn.Sequential(*(Block(dropout) for _ in range(LAYERS))).to(device)
    if variant == "regions":
        dc.apply(model, "*")
    units = [SpmdFullyShardedDataParallel(block, mesh=mesh) for block in model.children()]
    model = SpmdFullyShardedDataParallel(nn.Sequential(*units), mesh=mesh)
    x = torch.randn(BATCH, WIDTH).to(device).requires_grad_()
    xs.mark_sharding(x, mesh, ("fsdp", None))
    torch_xla.sync(wait=True)
    torch_xla.manual_seed(7)
    loss = model(x).square().mean()
    loss.backward()
    torch_xla.sync(wait=True)
    print(json.dumps({"loss": loss.item(), "bits": bits([x.grad, *(p.grad for p in model.parameters())])}))


if __name__ == "__main__":
    main(sys.argv[1], 0.1 if "dropout" in sys.argv[2:] else 0.0)
