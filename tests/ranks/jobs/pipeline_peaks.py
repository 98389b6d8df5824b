"""Peak of live bytes over a step of every schedule: torch's engine, and attached as it comes.

Beside the ordinary model stand stages in which early or kept values would cost most: a long way from the last region to
the output, a loss that needs more memory than the stage, one region only, regions inside regions.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import distckpt as dc
from distckpt.ranks import Coordinator
from launch.measure import LiveBytes
from tests.ranks.jobs import pipeline as jobs
from tests.ranks.jobs.pipeline import SCHEDULES, Block, pipeline
from tests.ranks.spawn import leave, report

BLOCKS, ROWS, WIDTH = 3, 32, 32


class Stack(nn.Module):
    """Blocks, each a region of torch's when ``torch`` is set, and then ``tail``."""

    torch = False

    def __init__(self, blocks: list[nn.Module], tail: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.tail = tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch_checkpoint(block, x, use_reentrant=False) if self.torch else block(x)
        return self.tail(x)


class MLP(nn.Sequential):
    """A block of which everything that a replay saves is for weights, so that it waits for the weight half."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH))


class Nested(nn.Module):
    """A region of the engine in force inside a block."""

    def __init__(self, torch_engine: Callable[[], bool]) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(WIDTH), Block(WIDTH), Block(WIDTH)
        self.torch_engine = torch_engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.torch_engine():
            x = torch_checkpoint(self.second, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        else:
            x = dc.checkpoint(self.second, x)
        return self.third(x)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x


def long_way(x: torch.Tensor) -> torch.Tensor:
    """Saves 24 times its input."""
    wide = x.repeat(1, 8)
    return x + (wide.sin() * wide.cos()).exp()[:, :WIDTH]


def seen_again(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape)


def wide_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Saves much more than a block does, as one with the head inside."""
    logits = out.repeat(1, 64)
    return (logits.softmax(-1) - target.repeat(1, 64)).square().mean()


CASES: dict[str, tuple[int, Any, Any]] = {  # blocks of a stage, what follows them, the loss
    "plain": (BLOCKS, plain, jobs.loss_of),
    "one block": (1, plain, jobs.loss_of),
    "long way": (2, long_way, jobs.loss_of),
    "view": (2, seen_again, jobs.loss_of),
    "wide loss": (2, plain, wide_loss),
    "nested": (2, plain, jobs.loss_of),
    "mlp": (BLOCKS, plain, jobs.loss_of),
}
RUNS = [("plain", name) for name in SCHEDULES] + [
    (case, "1F1B") for case in CASES if case not in ("plain", "mlp")
]
RUNS += [("mlp", name) for name in SCHEDULES]
SPLIT = [name for name in SCHEDULES if name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")]


def peak(name: str, case: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Of the second step; ``options`` are those of attach, None for torch's engine."""
    blocks, tail, loss = CASES[case]
    count = 2 * dist.get_world_size()
    kinds = {"nested": partial_nested(options is None), "mlp": MLP}
    kind: Any = kinds.get(case, lambda: Block(WIDTH))
    jobs_loss, jobs.loss_of = jobs.loss_of, loss
    try:
        schedule, stages = pipeline(name, count, lambda: Stack([kind() for _ in range(blocks)], tail))
    finally:
        jobs.loss_of = jobs_loss
    handle = None
    if options is None:
        for stage in stages.values():
            stage.submod.torch = True
    else:
        total = next(iter(stages.values())).num_stages
        handle = Coordinator().attach(schedule, plan=dict.fromkeys(range(total), "blocks.*"), **options)
    x, target = jobs.batch(count, ROWS, WIDTH)
    losses: list[torch.Tensor] = []
    more = {"target": target, "losses": losses} if any(s.is_last for s in stages.values()) else {}

    def once() -> None:
        for stage in stages.values():
            stage.submod.zero_grad()
        schedule.step(*((x,) if 0 in stages else ()), **more)

    once()
    losses.clear()
    gc.collect()
    dist.barrier()
    states = [dict(stage.submod.state_dict()) for stage in stages.values()]
    torch.manual_seed(3)
    with LiveBytes(states, x, target) as live:
        once()
    grads = [p.grad for stage in stages.values() for p in stage.submod.parameters() if p.grad is not None]
    found: dict[str, Any] = {"peak": live.peak, "grads": [zlib.crc32(g.numpy().tobytes()) for g in grads]}
    if handle is not None:
        found["early"] = {i: r.early.total() for i, r in handle.report().items()}
        found["weights early"] = sum(r.weights_early for r in handle.report().values())
        found["kept"] = sum(r.kept.total() for r in handle.report().values())
        found["lazy"] = [reason for r in handle.report().values() for reason in r.lazy]
        handle.remove()
    return found


def partial_nested(torch_engine: bool) -> Callable[[], nn.Module]:
    return lambda: Nested(lambda: torch_engine)


def main() -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for case, name in RUNS:
        if case == "plain" or (case == "mlp" and name in SPLIT) or dist.get_world_size() == 2:
            ways: dict[str, Any] = {"torch": None, "default": {}}
            if (case, name) in (("plain", "1F1B"), ("mlp", "ZBVZeroBubble")):
                ways["1 micro-batch"] = {"ahead": "1 micro-batch"}
            found[f"{case}, {name}"] = {way: peak(name, case, options) for way, options in ways.items()}
    report(found)
    leave()


if __name__ == "__main__":
    main()
