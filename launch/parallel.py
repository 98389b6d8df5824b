"""Ranks: start them, and bring their numbers together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from launch.errors import LaunchError

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


def mean(value: torch.Tensor | None) -> float:
    """The mean of a scalar over the ranks that have one. Collective."""
    total = torch.tensor([0.0, 0.0] if value is None else [float(value.detach().double()), 1.0]).double()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


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
