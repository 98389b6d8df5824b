"""Interleaved timing of many small calls in thread CPU time.

Cores that other jobs share make single timings useless. So every round times every contestant once, right
after each other; the smallest and the median round are kept, the cyclic garbage collector is off, and one
thread works.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """Microseconds per call of one contestant: forward, backward and both, smallest and median round.

    ``total_min`` is the sum of the two smallest, which need not be of one round.
    """

    forward_min: float
    backward_min: float
    total_min: float
    total_median: float


def quiet() -> None:
    """Make this process fit for timing: one thread, and no object made so far is the collector's business."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _clock(device: str) -> Callable[[], int]:
    """Nanoseconds of this thread; on a GPU, whose backward has a thread of its own, of the wall, when all is done."""
    if device == "cpu":
        return time.thread_time_ns

    def after_the_queue() -> int:
        torch.cuda.synchronize()
        return time.perf_counter_ns()

    return after_the_queue


def _round(
    make: Callable[[], torch.Tensor], calls: int, grad: torch.Tensor | None, clock: Callable[[], int]
) -> tuple[float, float]:
    outs: list[Any] = [None] * calls
    start = clock()
    for i in range(calls):
        outs[i] = make()
    middle = clock()
    if grad is None:
        return (middle - start) / calls / 1e3, 0.0
    for i in range(calls):
        outs[i].backward(grad)
        outs[i] = None
    end = clock()
    return (middle - start) / calls / 1e3, (end - middle) / calls / 1e3


def measure(
    makers: Mapping[str, Callable[[], torch.Tensor]],
    *,
    calls: int,
    rounds: int,
    grad: torch.Tensor | None,
    device: str = "cpu",
) -> dict[str, Sample]:
    """Time every maker in interleaved rounds.

    A maker builds one output; with ``grad`` its backward is timed too, without it only the call is. ``calls``
    is the number of calls in one timed round.
    """
    for make in makers.values():
        for _ in range(min(calls, 20)):
            out = make()
            if grad is not None:
                out.backward(grad)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    clock = _clock(device)
    names = list(makers)
    for turn in range(rounds):
        gc.collect()
        gc.disable()
        try:
            # the order turns with the rounds, so that nobody always runs behind the same neighbour
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(_round(makers[name], calls, grad, clock))
        finally:
            gc.enable()
    samples: dict[str, Sample] = {}
    for name, rows in times.items():
        forward, backward = min(row[0] for row in rows), min(row[1] for row in rows)
        middle = statistics.median(row[0] + row[1] for row in rows)
        samples[name] = Sample(forward, backward, forward + backward, middle)
    return samples
