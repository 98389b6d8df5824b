"""Every schedule without regions, and with them attached in several ways: gradients, draws, counts."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining as pp

from distckpt.ranks import Coordinator
from tests.ranks.spawn import leave, report

WIDTH, BLOCKS, ROWS = 16, 2, 4
SINGLE = {"GPipe": pp.ScheduleGPipe, "1F1B": pp.Schedule1F1B}
LOOPED = {
    "Interleaved1F1B": pp.ScheduleInterleaved1F1B,
    "LoopedBFS": pp.ScheduleLoopedBFS,
    "InterleavedZeroBubble": pp.ScheduleInterleavedZeroBubble,
}
FOLDED: dict[str, Any] = {
    "ZBVZeroBubble": pp.ScheduleZBVZeroBubble,
    "DualPipeV": pp.schedules.ScheduleDualPipeV,
}
OLD = torch.__version__.startswith("2.9")
if OLD:  # its ZBV sends to its own rank, which gloo cannot
    del FOLDED["ZBVZeroBubble"]
SCHEDULES = {**SINGLE, **LOOPED, **FOLDED}


class Block(nn.Module):
    """Three linears, a norm and dropout; counts its executions."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.mix = nn.Linear(2 * width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        h = torch.nn.functional.gelu(self.up(self.norm(x)))
        h = torch.nn.functional.dropout(self.mix(h).tanh(), 0.2)
        return x + torch.nn.functional.dropout(self.down(h), 0.1)


class Part(nn.Module):
    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((out - target) ** 2).mean()


def places(name: str, rank: int, world: int) -> tuple[list[int], int]:
    """The stages of ``rank``, and how many there are."""
    if name in SINGLE:
        return [rank], world
    if name in FOLDED:
        return [rank, 2 * world - 1 - rank], 2 * world
    return [rank, rank + world], 2 * world


def pipeline(
    name: str, count: int, make: Any = Part, group: Any = None, kinds: Any = SCHEDULES
) -> tuple[Any, dict[int, Any]]:
    """A schedule of ``count`` micro-batches and this rank's stages, with parameters that depend on the stage only."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine, total = places(name, rank, world)
    parts: dict[int, Any] = {}
    for index in mine:
        torch.manual_seed(index)
        parts[index] = make()
    stages = [pp.PipelineStage(part, i, total, torch.device("cpu"), group=group) for i, part in parts.items()]
    if OLD:
        for stage in stages:  # its handshake sends eight bytes where gloo expects four
            stage._get_init_p2p_neighbors_ops = list  # type: ignore[method-assign]
    given: Any = stages[0] if name in SINGLE else stages
    return kinds[name](given, count, loss_fn=loss_of), dict(zip(mine, stages, strict=True))


def batch(count: int, rows: int = ROWS, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(7)
    return torch.randn(rows * count, width, generator=made), torch.randn(rows * count, width, generator=made)


def step(schedule: Any, stages: dict[int, Any], count: int) -> list[torch.Tensor]:
    x, target = batch(count)
    losses: list[torch.Tensor] = []
    first = (x,) if 0 in stages else ()
    if any(s.is_last for s in stages.values()):
        schedule.step(*first, target=target, losses=losses)
    else:
        schedule.step(*first)
    return [loss.detach() for loss in losses]


def results(schedule: Any, stages: dict[int, Any], count: int, steps: int) -> list[torch.Tensor]:
    """Losses, accumulated gradients, and where the generator ended."""
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for _ in range(steps):
        for stage in stages.values():
            for block in stage.submod.blocks:
                block.runs = 0
        found += step(schedule, stages, count)
    for stage in stages.values():
        grads = [p.grad for p in stage.submod.parameters() if p.grad is not None]
        found += [g.to_local().clone() if hasattr(g, "to_local") else g.clone() for g in grads]
    return [*found, torch.get_rng_state()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def told(handle: Any) -> dict[int, Any]:
    """A report as JSON."""
    return {
        index: {
            "replays": [[mb, region, n] for (mb, region), n in sorted(r.replays.items())],
            "early": [[mb, region, n] for (mb, region), n in sorted(r.early.items())],
            "kept": [[mb, region, n] for (mb, region), n in sorted(r.kept.items())],
            "ahead_bytes": r.ahead_bytes,
            "weight_bytes": r.weight_bytes,
            "weights_early": r.weights_early,
            "stage": r.stage,
            "lazy": dict(r.lazy),
        }
        for index, r in handle.report().items()
    }


MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "early": {"ahead": "1 micro-batch"},
    "lazy": {"early_replay": False},
    "one region ahead": {"ahead": 4000},
}


def case(name: str, count: int, modes: dict[str, dict[str, Any]] = MODES) -> dict[str, Any]:
    """One schedule: without regions, then attached in every mode. Two steps each; counts are of the second."""
    plain = results(*pipeline(name, count), count, steps=2)
    found: dict[str, Any] = {}
    for mode, options in modes.items():
        schedule, stages = pipeline(name, count)
        total = next(iter(stages.values())).num_stages
        plan = dict.fromkeys(range(total), "blocks.*")
        with Coordinator().attach(schedule, plan=plan, **options) as handle:
            same = equal(plain, results(schedule, stages, count, steps=2))
            runs = {i: [b.runs for b in s.submod.blocks] for i, s in stages.items()}
            left = sum(len(s._distckpt_stage.sessions) for s in stages.values())
            found[mode] = {"equal": same, "runs": runs, "report": told(handle), "open": left}
    return found


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    names = sys.argv[1:] or list(SCHEDULES)
    report({name: case(name, 2 * world) for name in names})
    leave()


if __name__ == "__main__":
    main()
