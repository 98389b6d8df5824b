"""Rank kinds of a parallel layout, and what one rank of a kind would save and hold, on fake tensors.

A kind is a set of ranks that do the same and own equally many parameters: alike pipeline stages, and among the ranks
of one those whose shards are equally large. What they do is built and measured over torch's fake process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt as dc
from distckpt import modules
from distckpt._torch_dist import fake_store, fake_tensors
from launch.errors import BadOption
from launch.measure import LiveBytes
from launch.model import GPT, Part

PARALLEL = ("fsdp", "ddp", "pp", "tp", "pp+fsdp")


@dataclass(frozen=True)
class Layout:
    """A job to be looked at: the model, and how it lies over the ranks."""

    parallel: str
    ranks: int
    stages: int
    micro_batches: int
    layers: int
    width: int
    heads: int
    context: int
    batch: int  # sequences per rank and micro-batch
    dropout: float

    @property
    def shards(self) -> int:
        """Ranks over which one stage's parameters are spread."""
        return self.ranks // self.stages

    def mesh(self) -> DeviceMesh:
        """Pipeline outside, shards inside: a rank is stage * shards + shard."""
        if self.parallel == "pp+fsdp":
            return init_device_mesh("cpu", (self.stages, self.shards), mesh_dim_names=("pp", "fsdp"))
        return init_device_mesh("cpu", (self.ranks,), mesh_dim_names=(self.parallel,))

    def check(self) -> None:
        """Raise BadOption, with what to write instead, if there is no such job."""
        if self.parallel not in PARALLEL:
            raise BadOption(f"--parallel {self.parallel} is unknown", fix=f"use one of {', '.join(PARALLEL)}")
        for name in ("ranks", "stages", "micro_batches", "layers", "width", "heads", "context", "batch"):
            if getattr(self, name) < 1:
                raise BadOption(f"--{name.replace('_', '-')} is {getattr(self, name)}", fix="give 1 or more")
        if self.width % self.heads:
            raise BadOption(
                f"--width {self.width} is no multiple of --heads {self.heads}", fix="give one that is"
            )
        if self.ranks % self.stages:
            raise BadOption(
                f"--ranks {self.ranks} is no multiple of --stages {self.stages}", fix="give one that is"
            )
        if self.layers < self.stages:
            raise BadOption(
                f"--layers {self.layers} cannot make {self.stages} stages",
                fix=f"give --layers {self.stages} or more, or --parallel pp+fsdp with fewer --stages",
            )
        if self.parallel == "tp" and self.heads % self.ranks:
            raise BadOption(
                f"--heads {self.heads} cannot be shared by {self.ranks} ranks",
                fix=f"give a multiple of {self.ranks}",
            )


@dataclass(frozen=True)
class Kind:
    """Ranks that are alike, and what one of them comes to; bytes."""

    ranks: tuple[int, ...]
    stage: int
    units: int  # FSDP units; 0 where parameters are not sharded
    regions: int
    in_flight: int  # micro-batches whose forward waits for its backward, at most
    parameters: int  # with as much again in gradients, and twice as much in AdamW's two moments
    saved: int  # for backward, by one micro-batch
    unsaved: int  # the same without regions
    peak: int  # parameters, gradients, activations (and DDP's buckets) at the fullest moment, without the optimizer


def in_flight(layout: Layout, stage: int) -> int:
    """Forwards of a stage before its first backward under 1F1B, and so the most that wait at once."""
    return min(layout.micro_batches, layout.stages - stage)


def order(layout: Layout, stage: int) -> list[tuple[str, int]]:
    """What a stage does under 1F1B: ("forward", micro-batch) and ("backward", micro-batch)."""
    warm, every = in_flight(layout, stage), layout.micro_batches
    steps = [("forward", i) for i in range(warm)]
    for i in range(every):
        steps.append(("backward", i))
        if warm + i < every:
            steps.append(("forward", warm + i))
    return steps


class Stage(Part):
    """One stage of a layout's model, made without the others."""

    def __init__(self, layout: Layout, stage: int) -> None:
        whole = GPT(
            layers=blocks(layout, stage),
            width=layout.width,
            heads=layout.heads,
            context=layout.context,
            dropout=layout.dropout,
        )
        last = stage == layout.stages - 1
        super().__init__(whole, 0, len(whole.blocks), first=stage == 0, last=last)


def blocks(layout: Layout, stage: int) -> int:
    """Blocks of a stage; the first stages have one more where it does not divide."""
    each, more = divmod(layout.layers, layout.stages)
    return each + (stage < more)


def kinds(layout: Layout) -> list[Kind]:
    """Every rank kind of a layout. Ranks that do the same are built and measured once, at the first of them: what FSDP
    lets them allocate is padded to the same size, and only how many parameters they own differs."""
    layout.check()
    measured: dict[tuple[object, ...], Kind] = {}
    found: dict[tuple[object, ...], list[int]] = {}
    for stage in range(layout.stages):
        first, last = stage == 0, stage == layout.stages - 1
        alike = (first, last, blocks(layout, stage), in_flight(layout, stage))
        if alike not in measured:
            measured[alike] = _measure(layout, stage)
        for owned, shards in _owners(layout, stage, measured[alike].parameters).items():
            ranks = [stage * layout.shards + shard for shard in shards]
            found.setdefault((alike, owned), []).extend(ranks)
    return [
        replace(measured[alike], ranks=tuple(ranks), parameters=owned)  # type: ignore[index,arg-type]
        for (alike, owned), ranks in found.items()
    ]


def _owners(layout: Layout, stage: int, whole: int) -> dict[int, list[int]]:
    """Shard numbers by how many bytes of parameters they own; `whole` where nothing is cut."""
    if "fsdp" not in layout.parallel:
        return {whole: list(range(layout.shards))}
    with torch.device("meta"):
        shapes = [p.shape for p in Stage(layout, stage).parameters()]
    found: dict[int, list[int]] = {}
    for shard in range(layout.shards):
        found.setdefault(sum(owned_bytes(shape, layout.shards, shard) for shape in shapes), []).append(shard)
    return found


def owned_bytes(shape: torch.Size, shards: int, shard: int) -> int:
    """What a shard owns of an fp32 parameter: FSDP2 cuts the first dimension into equal runs, the last ones short."""
    run = -(-shape[0] // shards)
    rows = max(0, min(run, shape[0] - shard * run))
    return rows * shape[1:].numel() * 4


@contextmanager
def _as_rank(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(layout: Layout, stage: int, mesh: DeviceMesh) -> tuple[Stage, int]:
    """One rank's model, and its FSDP units. The seam: regions and sharding go on here and nowhere else.

    Under DDP the model is as it is: DDP's reducer reads real memory, so its buckets are counted and not built.
    """
    part = Stage(layout, stage)
    if layout.parallel == "tp":
        for block in part.blocks.values():
            out, back = ColwiseParallel(), RowwiseParallel()
            parallelize_module(block, mesh["tp"], {"qkv": out, "proj": back, "up": out, "down": back})
    dc.apply(part, "blocks.*")
    if "fsdp" in layout.parallel:
        for block in part.blocks.values():
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(part, mesh=mesh["fsdp"])
        return part, len(part.blocks) + 1
    return part, 0


def _measure(layout: Layout, stage: int) -> Kind:
    with _as_rank(stage * layout.shards, layout.ranks):
        return _measured(layout, stage, layout.mesh())  # the mesh itself is real: torch reads its numbers


def _measured(layout: Layout, stage: int, mesh: DeviceMesh) -> Kind:
    with fake_tensors():
        model, units = _build(layout, stage, mesh)
        regions = modules.regions(model)
        count = len(regions)
        parameters = sum(_local(p) for p in model.parameters())
        peak = _step(layout, stage, model) + (parameters if layout.parallel == "ddp" else 0)
        saved = _saved(layout, stage, model)
        regions.remove()
        unsaved = _saved(layout, stage, model)
    waiting = in_flight(layout, stage)
    return Kind((), stage, units, count, waiting, parameters, saved, unsaved, peak)


def _local(parameter: torch.Tensor) -> int:
    mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return mine.numel() * mine.element_size()


def _batch(layout: Layout, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = layout.batch, layout.context
    targets = torch.zeros(shape, dtype=torch.long)
    x = (
        torch.zeros(shape, dtype=torch.long)
        if stage == 0
        else torch.zeros(*shape, layout.width, requires_grad=True)
    )
    return x, targets


def _saved(layout: Layout, stage: int, model: nn.Module) -> int:
    """Bytes that one micro-batch keeps for its backward: what is freed with its graph, and the input it was sent."""
    x, targets = _batch(layout, stage)
    with LiveBytes(list(model.parameters()), x, targets) as live:
        out = model(x, targets)
        kept = live.now() - out.untyped_storage().nbytes()
        del out
        return kept - live.now() + (x.untyped_storage().nbytes() if stage else 0)


def _step(layout: Layout, stage: int, model: nn.Module) -> int:
    """The most bytes alive in one optimizer step of this stage under 1F1B."""
    waiting: dict[int, torch.Tensor] = {}
    with LiveBytes(list(model.parameters())) as live:
        for what, i in order(layout, stage):
            if what == "forward":
                waiting[i] = model(*_batch(layout, stage))
                continue
            if isinstance(model, FSDPModule):
                last = i == layout.micro_batches - 1
                model.set_is_last_backward(last)  # these three as torch's pipeline stage does
                model.set_reshard_after_backward(last)
                model.set_requires_gradient_sync(last)
            out = waiting.pop(i)
            out.backward(torch.ones_like(out))
            del out
    model.zero_grad()
    return live.peak
