"""One GPT block in bf16, trained on the spot: step time, bytes held for backward, and gradients equal to the bit.

On a CUDA device the step is timed with events, eagerly and as one captured CUDA graph. Without one the CUDA
half is skipped with the reason and the CPU half runs, smaller.

    python benchmarks/gpt_block.py                 writes benchmarks/results/gpt_block-<device>.json
    python benchmarks/gpt_block.py --device cpu --no-write
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from engines import Engine, load
from livebytes import peak_of
from report import table, write
from torch import nn


@dataclass(frozen=True)
class Size:
    """Shape of the block: model width, heads, sequence length, batch."""

    width: int
    heads: int
    length: int
    batch: int


SIZES = {"cuda": Size(2048, 16, 2048, 8), "cpu": Size(256, 4, 256, 4)}


class Block(nn.Module):
    """A pre-norm transformer block with dropout after attention and after the MLP."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), self.dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout)


class Step:
    """Forward and backward of a fresh block from a fixed seed, through one engine (None: plain call)."""

    def __init__(self, engine: Engine | None, size: Size, device: str) -> None:
        torch.manual_seed(0)
        self.block = Block(size, dropout=0.1).to(device, torch.bfloat16)
        shape = (size.batch, size.length, size.width)
        self.x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.grad = torch.randn(shape, device=device, dtype=torch.bfloat16)
        self.engine = engine

    def __call__(self) -> None:
        """Run forward and backward; gradients are replaced, not added up."""
        self.clear()
        self.forward().backward(self.grad)

    def forward(self) -> torch.Tensor:
        """Run the block on an activation, as in the middle of a model."""
        hidden = self.x * 1.0
        return self.block(hidden) if self.engine is None else self.engine.region(self.block, hidden)

    def clear(self) -> None:
        """Drop all gradients."""
        self.x.grad = None
        for parameter in self.block.parameters():
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of one seeded step."""
        torch.manual_seed(1)
        self()
        return [p.grad.clone() for p in (self.x, *self.block.parameters()) if p.grad is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Say whether two lists of gradients are equal to the bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def time_cpu(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of thread CPU time of each step, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.thread_time()
            step()
            if turn:
                times[name].append((time.thread_time() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def time_cuda(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds between two events around each step, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        for name, step in steps.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def capture(step: Step) -> Callable[[], None]:
    """Return a replayable CUDA graph of the whole step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    step.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_cpu(engines: dict[str, Engine | None], size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure on the CPU."""
    steps = {name: Step(engine, size, "cpu") for name, engine in engines.items()}
    expected = steps["none"].gradients()
    times = time_cpu(dict(steps), rounds)
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        step.clear()
        equal = same(expected, step.gradients())
        step.clear()
        kept: list[torch.Tensor] = []
        _, held = peak_of(lambda step=step, kept=kept: kept.append(step.forward()))
        rows.append({"mode": "eager", "engine": name, "ms": times[name], "held": held, "equal": equal})
    return rows


def run_cuda(engines: dict[str, Engine | None], size: Size, rounds: int) -> list[dict[str, Any]]:
    """Measure on the current CUDA device: eagerly, then captured; a capture that fails says why."""
    steps = {name: Step(engine, size, "cuda") for name, engine in engines.items()}
    expected = steps["none"].gradients()
    rows: list[dict[str, Any]] = []
    times = time_cuda(dict(steps), rounds)
    for name, step in steps.items():
        equal = same(expected, step.gradients())
        step.clear()
        before = torch.cuda.memory_allocated()
        kept = step.forward()
        held = torch.cuda.memory_allocated() - before
        del kept
        rows.append({"mode": "eager", "engine": name, "ms": times[name], "held": held, "equal": equal})
    graphs: dict[str, Callable[[], None]] = {}
    for name, step in steps.items():
        try:
            graphs[name] = capture(step)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            rows.append({"mode": "CUDA graph", "engine": name, "ms": None, "held": None, "error": reason})
    times = time_cuda(graphs, rounds)
    reference: list[torch.Tensor] = []
    for name, replay in graphs.items():
        torch.manual_seed(1)
        replay()
        step = steps[name]
        found = [p.grad.clone() for p in (step.x, *step.block.parameters()) if p.grad is not None]
        reference = reference or found
        equal = same(reference, found)
        rows.append({"mode": "CUDA graph", "engine": name, "ms": times[name], "held": None, "equal": equal})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    base = {row["mode"]: row["ms"] for row in rows if row["engine"] == "none"}
    lines: list[list[str]] = []
    for row in rows:
        if row["ms"] is None:
            lines.append([row["mode"], row["engine"], "", "", "", row["error"]])
            continue
        held = "" if row["held"] is None else f"{row['held'] / 2**20:.1f}"
        equal = "yes" if row["equal"] else "NO"
        lines.append(
            [
                row["mode"],
                row["engine"],
                f"{row['ms']:.2f}",
                f"{row['ms'] / base[row['mode']]:.3f}",
                held,
                equal,
            ]
        )
    return table(
        ["mode", "engine", "step ms", "of none", "held for backward MiB", "gradients equal to the bit"], lines
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", default="dc,compat", help="engines next to torch, comma separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--width", type=int, help="model width, for a small trial run")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        print("skipped: the CUDA half, because torch.cuda.is_available() is False here\n")
        if device == "cuda":
            return
    size = SIZES[device]
    if options.width:
        size = Size(options.width, 2, 32, 2)
    torch.set_num_threads(1)
    names = ["torch", *options.ours.split(",")]
    engines: dict[str, Engine | None] = {"none": None, **{name: load(name) for name in names}}
    rows = (run_cuda if device == "cuda" else run_cpu)(engines, size, options.rounds)
    print(show(rows))
    if not options.no_write:
        command = f"python benchmarks/gpt_block.py --device {device}"
        path = write(f"gpt_block-{device}", command, {"size": vars(size), "rows": rows})
        print(f"\nwrote {path.name}")


if __name__ == "__main__":
    main()
