"""Regions under SPMD against the same program without them, on a mesh of 2 by 2 devices; each finding is a line of the
report. Run by test_spmd.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn
from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel

import distckpt as dc
from tests.xla.blocks import Block, bits, difference

xr.use_spmd()
MESH = xs.Mesh(np.arange(4), (2, 2), ("fsdp", "model"))
BATCH, WIDTH = 16, 32


class Sharded(nn.Module):
    """A tensor-parallel block that says inside how its values lie on the mesh, in place and with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def place(self) -> Sharded:
        xs.mark_sharding(self.up.weight, MESH, ("model", "fsdp"))
        xs.mark_sharding(self.down.weight, MESH, ("fsdp", "model"))
        return self

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        h = F.gelu(self.up(x))
        xs.mark_sharding(h, MESH, ("fsdp", "model"))
        h = xs.mark_sharding_with_gradients(F.dropout(h, 0.2), MESH, ("fsdp", "model"))
        out = x + self.down(h)
        return out if scale is None else out * scale


class Step(NamedTuple):
    """What one step left: a digest of the gradients, their sharding, the random state, the gradients."""

    digest: str
    sharding: list[str]
    state: int
    gradients: list[torch.Tensor]

    def equals(self, other: Step) -> bool:
        return self[:3] == other[:3]


def run(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], *, flush: bool = False) -> Step:
    """One step of `call`."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH).to("xla").requires_grad_()
    xs.mark_sharding(x, MESH, ("fsdp", None))
    for parameter in model.parameters():
        parameter.grad = None
    torch_xla.sync(wait=True)
    torch_xla.manual_seed(7)
    loss = call(x).square().mean()
    if flush:
        torch_xla.sync(wait=True)
    loss.backward()
    state = xm.get_rng_state()
    torch_xla.sync(wait=True)
    found = [x.grad, *(p.grad for p in model.parameters())]
    sharding = [torch_xla._XLAC._get_xla_sharding_spec(g) for g in found]
    return Step(bits(found), sharding, state, [g.cpu() for g in found])


def annotations() -> dict[str, Any]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Sharded() for _ in range(2)).to("xla")
    for block in blocks:
        block.place()
    scale = torch.rand(WIDTH).to("xla")

    def plain(x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = block(x, scale=scale)
        return x

    def function(x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = dc.checkpoint(block, x, scale=scale)
        return x

    expected, flushed = run(blocks, plain), run(blocks, plain, flush=True)
    found = {
        "annotations inside, dc.checkpoint": run(blocks, function).equals(expected),
        "a flush before backward, difference": difference(
            flushed.gradients, run(blocks, function, flush=True).gradients
        ),
    }
    with dc.apply(blocks, "*"):
        found["annotations inside, dc.apply"] = run(blocks, plain).equals(expected)
    return found


def small_blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(0.2, sizes=(WIDTH, 2 * WIDTH)).to("xla") for _ in range(2)]


def orders() -> dict[str, bool]:
    def wrapped(order: str) -> Step:
        blocks = small_blocks()
        if order == "inside":
            for block in blocks:
                dc.apply(block, "")
        units = [SpmdFullyShardedDataParallel(block, mesh=MESH) for block in blocks]
        if order == "around":
            for unit in units:
                dc.apply(unit, "")
        if order == "inside, after wrapping":
            for unit in units:
                dc.apply(unit.module, "")
        model = nn.Sequential(*units)
        return run(model, model)

    expected = wrapped("none")
    return {
        f"regions {o} FSDPv2 units": wrapped(o).equals(expected)
        for o in ("inside", "around", "inside, after wrapping")
    }


def training() -> dict[str, Any]:
    def train(regions: bool) -> tuple[str, int]:
        blocks = small_blocks()
        model = nn.Sequential(*(SpmdFullyShardedDataParallel(block, mesh=MESH) for block in blocks))
        if regions:
            for block in blocks:
                dc.apply(block, "")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch_xla.manual_seed(3)
        programs = []
        for step in range(5):
            torch.manual_seed(step)
            x = torch.randn(BATCH, WIDTH).to("xla")
            xs.mark_sharding(x, MESH, ("fsdp", None))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            torch_xla.sync(wait=True)
            programs.append((metrics.metric_data("CompileTime") or [0])[0])
        return bits(model.parameters()), programs[-1] - programs[2]

    plain, regions = train(False), train(True)
    return {"five steps of SGD": plain[0] == regions[0], "programs compiled after the third step": regions[1]}


if __name__ == "__main__":
    print(json.dumps({**annotations(), **orders(), **training()}))
