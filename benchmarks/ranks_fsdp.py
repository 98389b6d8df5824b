"""FSDP2 with regions on two ranks over gloo: all-gathers of a step, runs of each block, and step time.

Every row trains the same small GPT without regions, with torch's ``checkpoint_wrapper`` inside the units, and with
``coord.fully_shard``. The counts are exact. Times are wall clock on the first rank, all contestants of a row
interleaved in one run.

    python benchmarks/ranks_fsdp.py                starts the two ranks, writes benchmarks/results/ranks_fsdp.json
    python benchmarks/ranks_fsdp.py --rounds 1 --no-write
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt_block import Block, Size
from report import table, write
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distckpt.ranks import Coordinator
from tests.ranks.collectives import Collectives

SIZE = Size(width=64, heads=4, length=32, batch=2)
PARTS = ("qkv", "out", "up", "down")
ENGINES = ("none", "torch", "dc")


class Counted(Block):
    """A block that counts its own runs, replays included."""

    runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, width) to the same shape."""
        self.runs += 1
        return super().forward(x)


class Model(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Counted(SIZE, dropout=0.1) for _ in range(4))
        self.head = nn.Linear(SIZE.width, SIZE.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, width) to the same shape."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def blocks(model: Any) -> list[Any]:
    """The blocks, without the wrappers around them."""
    return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.layers]


def prefetch(model: Any) -> None:
    """Each unit names the two that follow it in the forward."""
    order = [
        unit
        for layer, block in zip(model.layers, blocks(model), strict=True)
        for unit in (layer, *(getattr(block, part) for part in PARTS))
    ]
    for index, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[index + 1 : index + 3])


# name -> (are there units inside the blocks, options, what is done afterwards)
LAYOUTS: dict[str, tuple[bool, dict[str, Any], Callable[[Any], None] | None]] = {
    "a unit per block": (False, {}, None),
    "the same, kept after forward": (False, {"reshard_after_forward": False}, None),
    "units inside each block too": (True, {}, None),
    "the same, prefetched by hand": (True, {}, prefetch),
}


def build(engine: str, layout: str) -> Any:
    """A sharded model, with regions on its blocks unless ``engine`` is ``none``."""
    nested, options, after = LAYOUTS[layout]
    model: Any = Model()
    if engine == "dc":
        units = ["layers.*", *(f"layers.*.{part}" for part in PARTS if nested)]
        Coordinator(device_type="cpu").fully_shard(model, units, regions="layers.*", **options)
    else:
        for index, layer in enumerate(model.layers):
            for part in PARTS if nested else ():
                fully_shard(getattr(layer, part), **options)
            if engine == "torch":
                model.layers[index] = checkpoint_wrapper(layer)
            fully_shard(model.layers[index], **options)
        fully_shard(model, **options)
    if after is not None:
        after(model)
    return model


def step(model: Any) -> None:
    """Forward and backward of one batch; gradients are replaced."""
    model.zero_grad()
    model(torch.randn(SIZE.batch, SIZE.length, SIZE.width)).sum().backward()


def count(model: Any) -> dict[str, Any]:
    """The second step's collectives and runs, and its gradients."""
    step(model)
    for block in blocks(model):
        block.runs = 0
    torch.manual_seed(dist.get_rank())
    with Collectives() as seen:
        step(model)
    (runs,) = {block.runs for block in blocks(model)}
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {
        "gathers": len(seen.sizes("allgather")),
        "scatters": len(seen.sizes("reduce_scatter")),
        "runs": runs,
        "gradients": [g.clone() for g in gradients],
    }


def time_steps(models: dict[str, Any], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step, smallest and median of ``rounds``."""
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            start = time.perf_counter()
            step(models[name])
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (min(found), statistics.median(found)) for name, found in times.items()}


def measure(layout: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one layout."""
    models = {engine: build(engine, layout) for engine in ENGINES}
    counts = {engine: count(model) for engine, model in models.items()}
    reference = counts["none"]["gradients"]
    times = time_steps(models, rounds)
    rows = []
    for engine in ENGINES:
        found = counts[engine]
        same = all(torch.equal(a, b) for a, b in zip(found.pop("gradients"), reference, strict=True))
        least, middle = times[engine]
        rows.append(
            {"layout": layout, "engine": engine, **found, "equal": same, "ms": least, "median": middle}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table; ratios are to torch in the same layout."""
    base = {row["layout"]: row for row in rows if row["engine"] == "torch"}
    lines = []
    for row in rows:
        over = base[row["layout"]]
        lines.append(
            [
                row["layout"],
                row["engine"],
                str(row["gathers"]),
                str(row["scatters"]),
                str(row["runs"]),
                f"{row['ms']:.1f}",
                f"{row['ms'] / over['ms']:.2f}",
                f"{row['median'] / over['median']:.2f}",
                "yes" if row["equal"] else "no",
            ]
        )
    header = ["units", "engine", "all-gathers", "reduce-scatters", "runs of a block", "step ms", "of torch"]
    return table([*header, "by median", "gradients equal to the bit"], lines)


def main() -> None:
    """Run from the command line: as the starter of the ranks, or as a rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        sys.exit(
            subprocess.run([*torchrun, *sys.argv], env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
        )
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module"
    )  # about in-place changes of a unit's output
    dist.init_process_group("gloo")
    rows = [row for layout in LAYOUTS for row in measure(layout, options.rounds)]
    if dist.get_rank() == 0:
        print(show(rows))
        if not options.no_write:
            content = {"size": {"layers": 4, **vars(SIZE)}, "rows": rows}
            print(f"\nwrote {write('ranks_fsdp', 'python benchmarks/ranks_fsdp.py', content).name}")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads may abort when the other rank is gone first


if __name__ == "__main__":
    main()
