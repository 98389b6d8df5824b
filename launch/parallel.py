"""Ranks: start them, shard a model over them, and bring their numbers together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from launch.errors import LaunchError
from launch.model import GPT

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this rank does the talking."""
        return self.rank == 0


@contextmanager
def joined() -> Iterator[World]:
    """Join the ranks that torchrun started, over gloo; without torchrun, a world of one."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shard(model: GPT, dtype: str) -> GPT:
    """FSDP2 in place: a unit for each block and one for the rest. `dtype` is "fp32" or "bf16".

    bf16 gathers parameters and computes in bf16; gradients are reduced and kept in fp32.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    precision = MixedPrecisionPolicy()
    if dtype == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


def mean(value: torch.Tensor) -> float:
    """The mean of a scalar over the ranks."""
    total = value.detach().clone().double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def everyone(thing: object) -> list[object]:
    """What each rank has, by rank."""
    things: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def agree(work: Callable[[], T]) -> T:
    """Do `work` on every rank and raise on all of them what it raised on any, so that none is left waiting.

    Only LaunchError is shared: anything else is a bug, and stops its own rank at once.
    """
    done: T | None = None
    error: LaunchError | None = None
    try:
        done = work()
    except LaunchError as raised:
        error = raised
    for other in everyone(error):
        if isinstance(other, LaunchError):
            raise other
    return cast(T, done)
