"""Tensor parallel layout: all blocks on every rank, with a share of the heads and channels of each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt as dc
from launch.errors import BadOption
from launch.layouts.base import WholeModel, build
from launch.modes import put
from launch.options import Options
from launch.parallel import World

_PLAN = {
    "qkv": ColwiseParallel(),
    "proj": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


class TensorParallel(WholeModel):
    """Attention by heads and the MLP by channels; one all-reduce after each, also in a replay.

    What is dropped between the blocks is whole on every rank, so every rank drops the same: ``rng_rank`` is 0. What is
    dropped inside attention is of this rank's heads, and drawn from the stream ``tensor-parallel``. The streams of a
    step are seeded by a draw that is the same on every rank, so there is nothing more to save for a resume.
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
            block.own_heads = partial(dc.rng.stream, "tensor-parallel")  # type: ignore[assignment]
        put(model, mode)
        self.model = model
        self._mesh = mesh

    def around(self) -> AbstractContextManager[object]:
        return dc.rng.seed_streams(self._mesh, int(torch.randint(2**31, ())))
