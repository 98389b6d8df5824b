"""What ``accelerate launch`` runs: one DDP step with and without regions on each rank."""

from __future__ import annotations

from typing import Any

import torch

import distckpt as dc
from distckpt.engine.stats import counters
from tests.integrations.models import batch, build, without_cache
from tests.ranks.spawn import leave, report


def gradients(regions: bool) -> list[Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = without_cache(build("gpt2"))
    if regions:
        dc.apply(model)
    model = accelerator.prepare(model)
    torch.manual_seed(7 + accelerator.process_index)
    loss = model(**batch(seed=accelerator.process_index)).loss
    accelerator.backward(loss)
    return [accelerator, model, *(p.grad for p in model.parameters())]


def main() -> None:
    torch.set_num_threads(1)
    accelerator, _, *expected = gradients(regions=False)
    before = counters.regions
    _, model, *got = gradients(regions=True)
    report(
        {
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "model": type(model).__name__,
            "regions": counters.regions - before,
            "same": all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)),
        }
    )
    leave()


if __name__ == "__main__":
    main()
