"""One rank of the FSDP2 tests: the same two steps without regions, and with regions put on in every way and order."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distckpt._torch_dist import UNITS_IN_REPLAYS
from distckpt.compat.wrapper import checkpoint_wrapper, composable_checkpoint
from distckpt.engine.stats import counters
from distckpt.modules import apply
from tests.modules.models import Model
from tests.ranks.collectives import Collectives


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def put_regions(model: Model, how: str) -> None:
    if how == "apply":
        apply(model, "layers.*")
    for index, layer in enumerate(model.layers):
        if how == "composable":
            composable_checkpoint(layer)
        elif how == "wrapper":
            model.layers[index] = checkpoint_wrapper(layer)


def run(
    how: str, order: str, units: str, precision: MixedPrecisionPolicy
) -> tuple[list[torch.Tensor], dict[str, int], int]:
    """Outputs, gradients and new parameters of two steps; collectives; replays."""
    model = Model(layers=3)
    for layer in model.layers:
        layer.norm = torch.nn.LayerNorm(8)
    if order == "before":
        put_regions(model, how)
    for layer in model.layers:
        if units == "nested":
            fully_shard(layer.attn, mp_policy=precision)
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    if order == "after":
        put_regions(model, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen, replays = [], counters.replays
    with Collectives() as communication:
        for index in range(2):
            torch.manual_seed(10 * index + dist.get_rank())
            out = model(torch.randn(4, 8))
            out.sum().backward()
            seen += [out.detach(), *(p.grad for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
    return (
        [whole(t).clone() for t in (*seen, *model.parameters())],
        communication.counts,
        counters.replays - replays,
    )


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for units, precision in (
        ("flat", MixedPrecisionPolicy()),
        ("nested", MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    ):
        if units == "nested" and not UNITS_IN_REPLAYS:
            continue
        plain, collectives, _ = run("none", "", units, precision)
        assert any("allgather" in name for name in collectives), collectives
        for how in ("apply", "composable", "wrapper"):
            # A wrapper put on afterwards would hide the unit from the model that shards it.
            for order in ("before",) if how == "wrapper" else ("before", "after"):
                ours, counts, replays = run(how, order, units, precision)
                assert replays == 6, (how, order, replays)
                assert counts == collectives, (how, order, units, counts, collectives)
                for index, (a, b) in enumerate(zip(ours, plain, strict=True)):
                    assert torch.equal(a, b), (how, order, units, index)
    print(collectives, flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads abort now and then when the other rank is gone before them


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
