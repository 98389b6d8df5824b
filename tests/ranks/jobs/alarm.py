"""A replay fails on rank 1 while the others wait for it somewhere; argument: where, and what rank 1 does after."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import distckpt as dc
from tests.ranks.spawn import report

where, then = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=90))
RANK = dist.get_rank()
coord = dc.Coordinator(timeout=80)
coord.check()
assert coord._alarm is not None
coord._alarm.grace = 2.0


def sometimes(x: torch.Tensor) -> torch.Tensor:
    if RANK == 1 and dc.is_recomputing():
        raise ValueError("a replay that fails on one rank only")
    return x.sin().exp()


x = torch.ones(4, requires_grad=True)
y = dc.checkpoint(sometimes, x, name="the bad block")
start = time.monotonic()
try:
    try:
        y.sum().backward()
    except ValueError:
        report({"own error after": time.monotonic() - start})
        if then == "exits":
            os._exit(1)
        if then == "goes on":  # it swallowed the error and computes for long
            time.sleep(9)
        raise
    if where == "collective":
        dist.all_reduce(x.grad)
    elif where == "meeting":
        coord.check()
    elif where == "python":
        while True:
            time.sleep(0.01)
except dc.errors.RemoteReplayFailed as error:
    report({"class": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start})
    sys.stdout.flush()
    os._exit(7)
