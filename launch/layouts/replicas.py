"""Data parallel layouts: every rank runs the whole model on text of its own."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from launch.layouts.base import WholeModel, build, precision
from launch.modes import put
from launch.options import Options
from launch.parallel import World


class _Replicas(WholeModel):
    def __init__(self, options: Options, mode: str, world: World) -> None:
        model = build(options)
        put(model, mode)
        self.model = self._spread(model, options, world)
        self.data_rank = self.rng_rank = world.rank
        self.replicas = world.size

    def _spread(self, model: nn.Module, options: Options, world: World) -> nn.Module:
        raise NotImplementedError


class Sharded(_Replicas):
    """FSDP2: a unit for each block and one for the rest."""

    def _spread(self, model: nn.Module, options: Options, world: World) -> nn.Module:
        shard(model, options, init_device_mesh("cpu", (world.size,)))
        return model


def shard(model: nn.Module, options: Options, mesh: DeviceMesh) -> None:
    """FSDP2 in place, outside the regions: a unit for each block and one for the rest."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=precision(options))
    fully_shard(model, mesh=mesh, mp_policy=precision(options))


class DataParallel(_Replicas):
    """DDP: every rank keeps all parameters, and gradients are averaged."""

    def _spread(self, model: nn.Module, options: Options, world: World) -> nn.Module:
        return DistributedDataParallel(model)
