"""Ranks: start them, and bring their numbers together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

import distckpt as dc
from launch.errors import LaunchError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    coordinator: dc.Coordinator

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
        with dc.Coordinator() as coordinator:  # its alarm ends before the group does
            yield World(dist.get_rank(), dist.get_world_size(), coordinator)
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


def shared(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank; returns what each came to, by rank. Collective.

    What it raised on any rank is raised on all of them, so that none is left waiting. Only LaunchError is shared:
    anything else is a bug, and stops its own rank at once.
    """
    done: T | LaunchError
    try:
        done = work()
    except LaunchError as raised:
        done = raised
    found = everyone(done)
    for other in found:
        if isinstance(other, LaunchError):
            raise other
    return cast(list[T], found)


def agree(work: Callable[[], T]) -> T:
    """Do `work` on every rank; returns what this rank came to. Collective, and raises as `shared` does."""
    return shared(work)[dist.get_rank()]


def once(work: Callable[[], T]) -> T:
    """Do `work` on the first rank alone; returns what it came to, on all. Collective, and raises as `shared` does."""
    return cast(T, shared(lambda: work() if dist.get_rank() == 0 else None)[0])
