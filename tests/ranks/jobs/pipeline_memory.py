"""Peak of live bytes over a step: regions alone, and attached in several ways.

With one rank 1F1B is its own last stage, and nothing else in the process allocates; with two, the first of them waits.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distckpt as dc
from distckpt.ranks import Coordinator
from tests.ranks.jobs.pipeline import Part, batch, pipeline
from tests.ranks.spawn import ROOT, leave, report

sys.path.insert(0, str(ROOT / "benchmarks"))
from livebytes import peak_of

COUNT, BLOCKS, ROWS, WIDTH = 3, 3, 64, 64
LIMIT = 250_000  # one block's recomputed values, not two
OPTIONS: dict[str, Any] = {
    "alone": None,
    "lazy": {"early_replay": False},
    "default": {},
    "early": {"ahead": "1 micro-batch"},
    "limited": {"ahead": LIMIT},
}


def peak(options: dict[str, Any] | None) -> dict[str, Any]:
    """Of the third step of 1F1B; without ``options`` the regions are not attached."""

    def made() -> nn.Module:
        return Part(BLOCKS, WIDTH)

    schedule, stages = pipeline("1F1B", COUNT, made)
    total = next(iter(stages.values())).num_stages
    handle = None
    if options is None:
        for stage in stages.values():
            dc.apply(stage.submod, "blocks.*")
    else:
        handle = Coordinator().attach(schedule, plan=dict.fromkeys(range(total), "blocks.*"), **options)
    x, target = batch(COUNT, ROWS, WIDTH)
    losses: list[torch.Tensor] = []
    more = {"target": target, "losses": losses} if any(s.is_last for s in stages.values()) else {}

    def once() -> None:
        schedule.step(*((x,) if 0 in stages else ()), **more)

    once()
    once()
    gc.collect()
    gc.disable()
    dist.barrier()
    high, _ = peak_of(once)
    gc.enable()
    if handle is None:
        return {"peak": high}
    reports = handle.report().values()
    handle.remove()
    return {
        "peak": high,
        "ahead": max(r.ahead_bytes for r in reports),
        "kept": sum(r.kept.total() for r in reports),
        "replays": sum(r.replays.total() for r in reports),
    }


def main() -> None:
    dist.init_process_group("gloo")
    found = {mode: peak(options) for mode, options in OPTIONS.items()}
    report(found)
    leave()


if __name__ == "__main__":
    main()
