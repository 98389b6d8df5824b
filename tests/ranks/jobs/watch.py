"""Two ranks with collectives inside replays, in the same and in different orders; each reports what it got."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from distckpt_backends.errors import DistckptError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt as dc
from tests.ranks.spawn import leave, report

dist.init_process_group("gloo")
RANK = dist.get_rank()
found: dict[str, Any] = {}
pair = dist.new_group([0, 1])
alone = [dist.new_group([rank]) for rank in (0, 1)]


def block(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return x.sin() * total


def other(x: torch.Tensor) -> torch.Tensor:
    total = functional.wait_tensor(functional.all_gather_tensor(x.detach(), 0, dist.group.WORLD))
    return x.sin() * total[: len(x)]


def attempt(name: str, run: Any, *, every: int = 1, timeout: float = 60) -> None:
    coord = dc.Coordinator(timeout=timeout, alarm=False)
    x = torch.arange(4.0, requires_grad=True)
    start = time.monotonic()
    watch = coord.watch(every=every)
    result: Any = None
    try:
        with watch:
            run(x)
    except DistckptError as error:
        result = {"class": type(error).__name__, "code": error.code, "text": str(error)}
    grad = None if x.grad is None else x.grad.tolist()
    found[name] = {
        "result": result,
        "compared": watch.compared,
        "grad": grad,
        "seconds": time.monotonic() - start,
    }
    dist.barrier()


def twice(f: Any, g: Any, *, swap: bool) -> Any:
    def run(x: torch.Tensor) -> None:
        y, z = dc.checkpoint(f, x).sum(), dc.checkpoint(g, x).sum()
        for loss in [z, y] if swap else [y, z]:
            loss.backward()

    return run


def plain(x: torch.Tensor) -> None:
    (block(x).sum() + other(x).sum()).backward()


x = torch.arange(4.0, requires_grad=True)
block(x).sum().backward()
other(x).sum().backward()
found["reference"] = x.grad.tolist()

attempt("same order", twice(block, other, swap=False))
attempt("no region", plain)
attempt("B before A", twice(block, other, swap=RANK == 1))
attempt("equal collectives of swapped regions", twice(block, block, swap=RANK == 1))
attempt("seen at the end", twice(block, block, swap=RANK == 1), every=100)
attempt("same order, compared at the end", twice(block, other, swap=False), every=100)
attempt("three at a time", lambda x: [twice(block, other, swap=False)(x) for _ in range(2)], every=3)


def two_groups(x: torch.Tensor) -> None:
    y, z = dc.checkpoint(block, x).sum(), dc.checkpoint(block, x, pair).sum()
    for loss in [z, y] if RANK else [y, z]:
        loss.backward()


attempt("groups swapped", two_groups)
attempt("a group of one rank", lambda x: dc.checkpoint(block, x, alone[RANK]).sum().backward())


def only_on_one(x: torch.Tensor) -> None:
    y = dc.checkpoint(block, x).sum()
    if RANK == 0:
        y.backward()


attempt("one rank does not replay", only_on_one, timeout=2)


def sharded(x: torch.Tensor) -> None:
    """FSDP2 units inside regions: each replay gathers the unit's parameters again."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)])
    for unit in model:
        fully_shard(unit)
    h = x
    for unit in model:
        h = dc.checkpoint(unit, h)
    h.sum().backward()


def tensor_parallel(swap: bool) -> Any:
    """Two tensor parallel MLPs as regions: each replay has the all-reduce of its row-wise layer."""

    def run(x: torch.Tensor) -> None:
        torch.manual_seed(0)
        losses = []
        for _ in range(2):
            mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
            parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            losses.append(dc.checkpoint(mlp, x).sum())
        for loss in reversed(losses) if swap else losses:
            loss.backward()

    return run


mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
attempt("sharded units inside regions", sharded)
attempt("tensor parallel", tensor_parallel(False))
attempt("tensor parallel, swapped", tensor_parallel(RANK == 1))
attempt("after all errors", twice(block, other, swap=False))
report(found)
leave()
