"""What it would cost to see the state that a replay reads live, for the rows of docs/semantics.md that say a cost.

    python benchmarks/unseen.py

Each row is a check at its cheapest: the state is read when the region is recorded and again before its replay, and
compared. The ratio is to forward and backward of the region itself, in turns in one process, CPU time of one thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpt_block import Block, Size
from report import table

import distckpt as dc

Job = Callable[[], Any]


def chain(ops: int) -> Job:
    """Return a step of a region of ``ops`` operators on four floats, each of which saves a tensor."""
    x = torch.randn(4, requires_grad=True)

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(ops):
            x = x.sin()
        return x

    return lambda: dc.checkpoint(fn, x).sum().backward()


def python_state() -> bool:
    return random.getstate() == random.getstate()


def numpy_state() -> bool:
    before, after = np.random.get_state(), np.random.get_state()
    return bool(before[2] == after[2] and (before[1] == after[1]).all())


def bits_of(parameters: list[torch.Tensor]) -> Job:
    """Return a check that adds up the bits of every parameter, twice."""
    return lambda: [[int(p.detach().view(torch.int32).sum()) for p in parameters] for _ in range(2)]


def block(width: int, tokens: int) -> tuple[Job, Job]:
    """Return the step of one GPT block as a region, and the check of its parameters."""
    module = Block(Size(width, width // 64, tokens, 1), dropout=0.1)
    x = torch.randn(1, tokens, width, requires_grad=True)
    return lambda: dc.checkpoint(module, x).sum().backward(), bits_of(list(module.parameters()))


def seconds(job: Job, calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        job()
    return (time.thread_time() - start) / calls


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[tuple[str, str, Job, Job, int]] = []
    for ops in (1, 10, 50):
        for name, check in (("Python's generator", python_state), ("numpy's generator", numpy_state)):
            cases.append((name, f"{ops} saved tensors", chain(ops), check, 100))
    for width in options.widths:
        for tokens in (64, 1024):
            step, check = block(width, tokens)
            cases.append(
                ("bits of the parameters", f"GPT block, width {width}, {tokens} tokens", step, check, 1)
            )
    rows = []
    for name, region, step, check, calls in cases:
        taken = [(seconds(step, calls), seconds(check, calls)) for _ in range(options.rounds)]
        whole, more = (statistics.median(times) for times in zip(*taken, strict=True))
        rows.append([name, region, f"{whole * 1e6:.0f}", f"{more * 1e6:.0f}", f"{more / whole:.1%}"])
    print(table(["check", "region", "region us", "check us", "share"], rows))


if __name__ == "__main__":
    main()
