"""FSDP2 inside pipeline stages, on a mesh of 2 stages' ranks by 2 replicas."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt.ranks import Coordinator
from tests.ranks.jobs.pipeline import Part, equal, pipeline, results, told
from tests.ranks.spawn import leave, report

COUNT = 4


def run(name: str, mesh: Any, around: str, **sharded: Any) -> dict[str, Any]:
    """``around="block"``: a region inside each unit; ``"units"``: one region that calls every unit."""

    def make() -> nn.Module:
        part = Part()
        for block in part.blocks:
            fully_shard(block, mesh=mesh["dp"], **sharded)
        return Outer(part) if around == "units" else fully_shard(part, mesh=mesh["dp"], **sharded)

    group = mesh["pp"].get_group()
    plain = results(*pipeline(name, COUNT, make, group), COUNT, steps=2)
    schedule, stages = pipeline(name, COUNT, make, group)
    total = next(iter(stages.values())).num_stages
    plan = dict.fromkeys(range(total), "blocks.*" if around == "block" else "part")
    with Coordinator().attach(schedule, plan=plan, ahead="1 micro-batch") as handle:
        same = equal(plain, results(schedule, stages, COUNT, steps=2))
        return {"equal": same, "report": told(handle)}


class Outer(nn.Module):
    """A stage whose one region calls sharded units."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    @property
    def blocks(self) -> nn.ModuleList:
        return self.part.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    # Torch itself loses gradients in 1F1B when units are sharded again between two forwards, so GPipe stands for it.
    cases = {
        "1F1B": ("1F1B", "block", False),
        "Interleaved1F1B": ("Interleaved1F1B", "block", False),
        "InterleavedZeroBubble": ("InterleavedZeroBubble", "block", False),
        "sharded again": ("GPipe", "block", True),
        "around units": ("GPipe", "units", False),
    }
    found = {}
    for case in sys.argv[1:] or cases:
        name, around, again = cases[case]
        found[case] = run(name, mesh, around, reshard_after_forward=again)
    report(found)
    leave()


if __name__ == "__main__":
    main()
