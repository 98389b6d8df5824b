"""Pipeline stages: how often regions run and how long a step takes, over real gloo ranks.

python benchmarks/ranks_pipeline.py schedules          every schedule on 2 ranks that compute
python benchmarks/ranks_pipeline.py waits              1F1B, replay while the gradient is on its way or after it
python benchmarks/ranks_pipeline.py sleep --ranks 4    the same with stages that sleep instead of compute
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from report import RESULTS, table, write
from torch import nn
from torch.distributed import pipelining as pp
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

import distckpt as dc
from distckpt.ranks import Coordinator

SCHEDULES: dict[str, Any] = {
    "GPipe": pp.ScheduleGPipe,
    "1F1B": pp.Schedule1F1B,
    "Interleaved1F1B": pp.ScheduleInterleaved1F1B,
    "LoopedBFS": pp.ScheduleLoopedBFS,
    "InterleavedZeroBubble": pp.ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": pp.ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
SINGLE, FOLDED = ("GPipe", "1F1B"), ("ZBVZeroBubble", "DualPipeV")
Job = Callable[..., Any]


class Block(nn.Module):
    """A norm, three linears and dropout; ``torch_engine`` makes it a region of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.mix = nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        h = self.mix(nn.functional.gelu(self.up(self.norm(x)))).tanh()
        return x + self.down(nn.functional.dropout(h, 0.1))


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        ctx.save_for_backward(x)
        ctx.seconds = seconds
        return x + weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        assert ctx.saved_tensors is not None  # asking is what makes a region replay
        return grads[0], grads[0].sum(), None


class Sleeps(nn.Module):
    """A block that sleeps: one unit of time in its forward and its replay, two in its backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seconds = seconds
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        # asked for before the time passes, so that a replay before the backward takes its time before it too
        return Ask.apply(_Sleep.apply(x, self.weight, self.seconds))


class Ask(torch.autograd.Function):
    """Asks for a saved value in its backward, ahead of the one that sleeps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors is not None
        return grads[0]


class Part(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.torch_engine = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.torch_engine:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # type: ignore[attr-defined]
            else:
                x = block(x)
        return x


def loss_of(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((out - target) ** 2).mean()


class Pipeline:
    """A schedule on this rank, with a step to run."""

    def __init__(
        self, name: str, count: int, make: Callable[[], nn.Module], blocks: int, shape: tuple[int, int]
    ) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.total = world if name in SINGLE else 2 * world
        other = self.total - 1 - rank if name in FOLDED else rank + world
        mine = [rank] if name in SINGLE else [rank, other]
        torch.manual_seed(rank)
        self.parts = {i: Part(make, blocks) for i in mine}
        stages = [
            pp.PipelineStage(part, i, self.total, torch.device("cpu")) for i, part in self.parts.items()
        ]
        given: Any = stages[0] if name in SINGLE else stages
        self.schedule = SCHEDULES[name](given, count, loss_fn=loss_of)
        self.count = count
        rows, width = shape
        self.x, self.target = torch.randn(rows * count, width), torch.randn(rows * count, width)
        self.last = any(s.is_last for s in stages)

    def step(self) -> None:
        more: dict[str, Any] = {"target": self.target} if self.last else {}
        self.schedule.step(*((self.x,) if 0 in self.parts else ()), **more)

    def timed(self) -> float:
        """Seconds of one step, from a common start to the last rank's end."""
        dist.barrier()
        start = time.perf_counter()
        self.step()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    def blocks(self) -> list[Any]:
        return [b for part in self.parts.values() for b in part.blocks]

    def on(self, engine: str) -> Callable[[], Any]:
        """Turn an engine on; returns what turns it off, with its report if it has one."""
        if engine == "torch":
            for part in self.parts.values():
                part.torch_engine = True

            def off() -> None:
                for part in self.parts.values():
                    part.torch_engine = False

            return off
        if engine == "alone":
            applied = [dc.apply(part, "blocks.*") for part in self.parts.values()]
            return lambda: [one.remove() for one in applied] and None
        if engine in ("after", "default", "early only", "early"):
            plan = dict.fromkeys(range(self.total), "blocks.*")
            options: dict[str, Any] = {} if engine == "default" else {"ahead": "1 micro-batch"}
            if engine == "after":
                options = {"early_replay": False}
            handle = Coordinator().attach(self.schedule, plan=plan, **options)
            if engine == "early only":  # no region is kept, so what is left is the effect of the waits
                for stage in handle._stages.values():
                    stage.keeps = lambda *_: False  # type: ignore[method-assign]

            def remove() -> Any:
                found = handle.report()
                handle.remove()
                return found

            return remove
        return lambda: None


def measure(pipe: Pipeline, engines: list[str], rounds: int) -> dict[str, Any]:
    """Seconds per step and executions of a block per micro-batch, the engines in turns."""
    pipe.step()
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    runs: dict[str, list[float]] = {}
    early: dict[str, int] = {}
    for turn in range(rounds):
        for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
            off = pipe.on(engine)
            if turn == 0:
                pipe.step()
            for block in pipe.blocks():
                block.runs = 0
            times[engine].append(pipe.timed())
            runs[engine] = [block.runs / pipe.count for block in pipe.blocks()]
            found = off()
            if found is not None:
                early[engine] = sum(r.early.total() for r in found.values())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (runs, early))
    rows = {}
    for engine in engines:
        every = [n for one, _ in gathered for n in one[engine]]
        rows[engine] = {
            "seconds": statistics.median(times[engine]),
            "least": min(times[engine]),
            "runs": [min(every), max(every)],
            "early": sum(one.get(engine, 0) for _, one in gathered),
        }
    return rows


def schedules(rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Schedules with blocks that compute."""
    rows = []
    for name in names:
        pipe = Pipeline(name, 4, lambda: Block(256), 2, (64, 256))
        rows.append(
            {
                "schedule": name,
                "engines": measure(pipe, ["none", "torch", "alone", "default", "early"], rounds),
            }
        )
    return rows


def waits(rounds: int) -> list[dict[str, Any]]:
    """1F1B with blocks that compute."""
    rows = []
    for count in (4, 8):
        pipe = Pipeline("1F1B", count, lambda: Block(256), 4, (128, 256))
        rows.append(
            {
                "micro_batches": count,
                "engines": measure(
                    pipe, ["none", "torch", "alone", "after", "default", "early only", "early"], rounds
                ),
            }
        )
    return rows


def sleep(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """1F1B with blocks that sleep, two per stage."""
    rows = []
    world = dist.get_world_size()
    for count in (2 * world, 4 * world):
        pipe = Pipeline("1F1B", count, lambda: Sleeps(seconds), 2, (1, 4))
        rows.append(
            {
                "micro_batches": count,
                "engines": measure(
                    pipe, ["none", "torch", "alone", "after", "default", "early only", "early"], rounds
                ),
            }
        )
    return rows


def _rank(rank: int, world: int, folder: str, job: Job, options: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = job(*options)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(job: Job, world: int, *options: Any) -> Any:
    """What rank 0 of ``world`` processes got from ``job(*options)``."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, job, options), nprocs=world)  # type: ignore[attr-defined]
        return json.loads((Path(folder) / "rows.json").read_text())


def show(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out for a terminal."""
    lines = []
    for row in rows:
        case = row.get("schedule") or f"{row['ranks']} ranks, {row['micro_batches']} micro-batches"
        for engine, cost in row["engines"].items():
            low, high = cost["runs"]
            times = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            lines.append([case, engine, f"{cost['seconds'] * 1e3:.1f}", times, str(cost["early"])])
    return table(["case", "engine", "step ms", "runs of a block", "early"], lines)


def main() -> int:
    """Measure one part and write its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["schedules", "waits", "sleep"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SCHEDULES,
        metavar="SCHEDULE",
        help="print these schedules; write no file",
    )
    parser.add_argument("--seconds", type=float, default=0.005, help="of one block that sleeps")
    parser.add_argument("--no-write", action="store_true", help="write no file")
    options = parser.parse_args()
    command = "python benchmarks/ranks_pipeline.py " + options.part
    if options.part == "sleep":
        rows = run(sleep, options.ranks, options.rounds, options.seconds)
        command += " --ranks N"
    elif options.part == "waits":
        rows = run(waits, options.ranks, options.rounds)
    else:
        rows = run(schedules, options.ranks, options.rounds, options.only or list(SCHEDULES))
    for row in rows:
        row["ranks"] = options.ranks
    print(show(rows))
    if not options.no_write and not options.only:
        name = f"ranks_pipeline-{options.part}"
        path = RESULTS / f"{name}.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in kept if row["ranks"] != options.ranks] + rows
        write(name, command, {"rows": sorted(rows, key=lambda row: row["ranks"])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
