"""Pipeline layout: each rank has some of the blocks, and micro-batches travel through the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from distckpt.ranks.pipeline import Attached
from launch.errors import BadOption
from launch.layouts.base import Layout, build
from launch.layouts.replicas import shard
from launch.model import Part
from launch.modes import put
from launch.options import V_SCHEDULES, Options
from launch.parallel import World


class Pipeline(Layout):
    """One or two stages a rank, as the schedule wants them; under ``pp+fsdp`` each on two ranks, sharded by FSDP2."""

    def __init__(self, options: Options, mode: str, world: World) -> None:
        mesh = _mesh(options, world)
        pipe = mesh["pp"] if mesh.ndim > 1 else mesh
        ranks, rank = pipe.size(), pipe.get_local_rank()
        kind = get_schedule_class(options.schedule)
        many = issubclass(kind, PipelineScheduleMulti)
        stages = 2 * ranks if many else ranks
        if options.layers < stages:
            raise BadOption(
                f"--layers {options.layers} is too few for {stages} stages of --schedule {options.schedule}",
                fix=f"give {stages} or more",
            )
        second = 2 * ranks - 1 - rank if options.schedule in V_SCHEDULES else rank + ranks
        mine = (rank, second) if many else (rank,)
        whole = build(options)
        parts = {
            index: Part(
                whole, *_cut(options.layers, stages, index), first=index == 0, last=index == stages - 1
            )
            for index in mine
        }
        self.model = nn.ModuleDict({f"stage{index}": part for index, part in parts.items()})
        for part in parts.values():
            put(part, mode)
            if mesh.ndim > 1:
                shard(part, options, mesh["dp"])
        self._stages = [
            PipelineStage(
                part,
                index,
                stages,
                torch.device("cpu"),
                input_args=_example(options, part.first, whole),
                output_args=_example(options, False, whole, out=part.last),
                group=pipe.get_group(),
            )
            for index, part in parts.items()
        ]
        self._last = stages - 1 in mine
        self._schedule = self._make(kind, many, options)
        self._attached: Attached | None = None
        if mode == "distckpt":
            # One replay per block and micro-batch, made while the gradient is on its way.
            self._attached = world.coordinator.attach(
                self._schedule, early_replay=options.early_replay, ahead=options.ahead_amount
            )
        self._before_backward: Callable[[], None] | None = None
        for stage in self._stages:
            self._tell_of_backward(stage)
        self.data_rank = 0 if mesh.ndim == 1 else mesh["dp"].get_local_rank()
        self.replicas = 1 if mesh.ndim == 1 else mesh["dp"].size()
        self.rng_rank = world.rank

    def _make(self, kind: Any, many: bool, options: Options) -> Any:
        stages: Any = self._stages if many else self._stages[0]
        try:
            return kind(stages, n_microbatches=options.micro_batches, loss_fn=_loss)
        except ValueError as error:
            raise BadOption(
                f"--schedule {options.schedule} cannot run --micro-batches {options.micro_batches} here",
                fix=str(error).strip().rstrip("."),
            ) from error

    def _tell_of_backward(self, stage: PipelineStage) -> None:
        backward = stage.backward_one_chunk

        def told(*args: Any, **kwargs: Any) -> Any:
            if self._before_backward is not None:
                self._before_backward()
            return backward(*args, **kwargs)

        stage.backward_one_chunk = told  # type: ignore[method-assign]

    def stages(self) -> dict[int, nn.Module]:
        return {stage.stage_index: stage.submod for stage in self._stages}

    def replayed_early(self) -> int:
        reports = {} if self._attached is None else self._attached.report()
        return sum(report.early.total() for report in reports.values())

    def step(
        self, inputs: torch.Tensor, targets: torch.Tensor, before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor | None:
        self._before_backward = before_backward
        losses: list[torch.Tensor] = []
        try:
            first = any(stage.is_first for stage in self._stages)
            self._schedule.step(
                *((inputs,) if first else ()), target=targets if self._last else None, losses=losses
            )
        finally:
            self._before_backward = None
        return torch.stack([loss.detach() for loss in losses]).mean() if self._last else None


def _mesh(options: Options, world: World) -> DeviceMesh:
    if options.parallel == "pp":
        return init_device_mesh("cpu", (world.size,), mesh_dim_names=("pp",))
    if world.size % 2 or world.size < 4:
        raise BadOption(
            f"--parallel pp+fsdp on {world.size} ranks has no two ranks for each stage",
            fix="start an even number of 4 or more, for example torchrun --nproc_per_node 4",
        )
    return init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("pp", "dp"))


def _cut(layers: int, stages: int, index: int) -> tuple[int, int]:
    """The blocks of a stage, as a half-open range; early stages take what is left over."""
    each, more = divmod(layers, stages)
    start = index * each + min(index, more)
    return start, start + each + (index < more)


def _example(options: Options, text: bool, model: Any, out: bool = False) -> torch.Tensor:
    """What travels, as a tensor without data: torch then need not run the stage to find out."""
    size = (options.batch // options.micro_batches, options.context)
    if text:
        return torch.empty(size, dtype=torch.int64, device="meta")
    width = model.head.weight.shape[0] if out else options.width
    dtype = torch.bfloat16 if options.dtype == "bf16" and not out else torch.float32
    # Without requires_grad torch sends no gradient back over this edge.
    return torch.empty((*size, width), dtype=dtype, device="meta", requires_grad=True)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
