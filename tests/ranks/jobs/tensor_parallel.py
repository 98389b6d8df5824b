"""Tensor-parallel blocks with dropout in named streams: plain, in regions, with torch's regions, partitioned."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.ranks.coordinator import Coordinator
from tests.engine.exact import same_bits
from tests.ranks.spawn import leave, report

WIDTH, SEQUENCE, BATCH, BLOCKS = 16, 8, 2, 3


class Block(torch.nn.Module):
    """Norm, two linears, dropout on the split hidden values and on the output in stream ``outer``, if any."""

    def __init__(self, outer: str | None) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.w1 = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.w2 = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.outer = outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.w1(self.norm(x)))
        with dc.rng.stream("tensor-parallel"):
            y = dropout(y, 0.5)
        y = self.w2(y)
        if self.outer is None:
            return x + y
        with dc.rng.stream(self.outer):
            return x + dropout(y, 0.5)


PLANS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "tensor parallel": ("data-parallel", {"w1": ColwiseParallel(), "w2": RowwiseParallel()}),
    "sequence parallel": (
        "tensor-parallel",
        {
            "norm": SequenceParallel(),
            "w1": ColwiseParallel(input_layouts=Shard(1)),
            "w2": RowwiseParallel(output_layouts=Shard(1)),
        },
    ),
    "linear last": (None, {"w1": ColwiseParallel(), "w2": RowwiseParallel()}),
    "hidden as dtensor": (
        "data-parallel",
        {"w1": ColwiseParallel(use_local_output=False), "w2": RowwiseParallel()},
    ),
}


def run(kind: str, mesh: Any, how: str) -> dict[str, Any]:
    outer, plan = PLANS[kind]
    coord = Coordinator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(outer) for _ in range(BLOCKS)))
    for block in model:
        parallelize_module(block, mesh, plan)
    x = torch.randn(BATCH, SEQUENCE, WIDTH)
    if kind == "sequence parallel":
        x = x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()
    x.requires_grad_()
    partition = coord.partition(mesh, min_bytes=0) if how == "partition" else None
    options = {"partition": partition} if partition else {}
    regions = {
        "plain": lambda block, x: block(x),
        "torch": functools.partial(checkpoint, use_reentrant=False),
        "dc": dc.checkpoint,
        "partition": functools.partial(dc.checkpoint, **options),
    }
    replays = counters.replays
    with coord.streams(mesh, seed=5):
        with CommDebugMode() as comm:
            y = x
            for block in model:
                y = regions[how](block, y)
            forward = comm.get_total_counts()
            y.sum().backward()
        checked = (
            len(coord.check_streams()) if how != "torch" else 0
        )  # torch's regions leave our streams behind
        end = [torch.rand(2)]
        for name in ("tensor-parallel", "data-parallel"):
            with dc.rng.stream(name):
                end.append(torch.rand(2))
    gradients = [
        x.grad,
        *(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()),
    ]
    return {
        "gradients": gradients,
        "out": y.detach(),
        "end": end,
        "forward": forward,
        "all": comm.get_total_counts(),
        "gathers": partition.counts.gathers if partition else 0,
        "prefetched": partition.counts.prefetched if partition else 0,
        "replays": counters.replays - replays,
        "checked": checked,
    }


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")  # on the CPU
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found: dict[str, Any] = {}
    for kind in PLANS:
        plain = run(kind, mesh, "plain")
        row: dict[str, Any] = {"plain": {"forward": plain["forward"], "all": plain["all"]}}
        row["out"] = plain["out"].sum().item()
        for how in ("dc", "torch", "partition"):
            if how == "partition" and kind == "sequence parallel":
                continue
            it = run(kind, mesh, how)
            row[how] = {
                "equal": all(
                    map(
                        same_bits,
                        [plain["out"], *plain["gradients"], *plain["end"]],
                        [it["out"], *it["gradients"], *it["end"]],
                    )
                ),
                **{k: it[k] for k in ("forward", "all", "gathers", "prefetched", "replays", "checked")},
            }
        found[kind] = row
    report(found)
    leave()


if __name__ == "__main__":
    main()
