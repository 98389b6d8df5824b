"""Tensor parallel layout: all blocks on every rank, with a share of the heads and channels of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from launch.errors import BadOption
from launch.layouts.base import Layout, build
from launch.modes import put
from launch.options import Options
from launch.parallel import World

_PLAN = {
    "qkv": ColwiseParallel(),
    "proj": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


class TensorParallel(Layout):
    """Attention by heads and the MLP by channels; one all-reduce after each, also in a replay.

    What is dropped between the blocks is whole on every rank, so every rank drops the same: ``rng_rank`` is 0. What is
    dropped inside attention is this rank's own.
    """

    def __init__(self, options: Options, mode: str, world: World) -> None:
        if options.heads % world.size:
            raise BadOption(
                f"--heads {options.heads} cannot be shared by {world.size} ranks",
                fix=f"give a multiple of {world.size}",
            )
        model = build(options)
        mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
        for block in model.blocks:
            parallelize_module(block, mesh, _PLAN)
        put(model, mode)
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(inputs, targets)

    def step(
        self, inputs: torch.Tensor, targets: torch.Tensor, before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor:
        loss = self.forward(inputs, targets)
        if before_backward is not None:
            before_backward()
        loss.backward()
        return loss.detach()
