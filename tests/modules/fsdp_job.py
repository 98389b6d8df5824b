"""One rank of the FSDP2 tests: the same two steps without regions, and with regions put on before and after."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt.engine.events import counters
from distckpt.modules import apply
from tests.modules.models import Model


class Collectives(TorchDispatchMode):
    """Counts collectives by name. ``CommDebugMode`` cannot: its module tracker fails in a replay that stops early."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(
    order: str, units: str, precision: MixedPrecisionPolicy
) -> tuple[list[torch.Tensor], dict[str, int], int]:
    """Outputs, gradients and new parameters of two steps; collectives; replays."""
    model = Model(layers=3)
    for layer in model.layers:
        layer.norm = torch.nn.LayerNorm(8)
    if order == "before":
        apply(model, "layers.*")
    for layer in model.layers:
        if units == "nested":
            fully_shard(layer.attn, mp_policy=precision)
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    if order == "after":
        apply(model, "layers.*")
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
    for units in ("flat", "nested"):
        for precision in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
            plain, collectives, _ = run("never", units, precision)
            assert any("allgather" in name for name in collectives), collectives
            for order in ("before", "after"):
                ours, counts, replays = run(order, units, precision)
                assert replays == 6, replays
                assert counts == collectives, (units, order, counts, collectives)
                for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
                    assert torch.equal(a, b), (units, order, i)
    dist.destroy_process_group()
    print(collectives)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
