"""One rank of the FSDP1 and DDP tests: every case once without regions, and with regions put on in several ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import BackwardPrefetch, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP

import distckpt as dc
from distckpt.compat.wrapper import checkpoint_wrapper, composable_checkpoint
from distckpt.modules import apply
from distckpt.ranks.fsdp import guard_units
from tests.ranks.sharded import Model, compare, one_forward, train, two_forwards
from tests.ranks.spawn import leave, report

Step = Callable[..., None]


def accumulate(model: Any, phase: Callable[[str], None], x: torch.Tensor) -> None:
    with model.no_sync():
        one_forward(model, phase, x)
    one_forward(model, phase, x + 1)


def fsdp1(model: Any, inside: Callable[[Any], Any], outside: Callable[[Any], Any], **options: Any) -> Any:
    """Every layer and the root; ``inside`` and ``outside`` are put on the layer before and after it is wrapped."""
    for index, layer in enumerate(model.stack.layers):
        unit = FSDP(inside(layer), device_id=torch.device("cpu"), **options)
        model.stack.layers[index] = outside(unit)
    return FSDP(model, device_id=torch.device("cpu"), **options)


def same(x: Any) -> Any:
    return x


def region(x: Any) -> Any:
    apply(x, "")
    return x


def composable(x: Any) -> Any:
    composable_checkpoint(x)
    return x


FSDP1_CASES: dict[str, tuple[dict[str, Any], Step]] = {
    "full": ({"use_orig_params": True}, one_forward),
    "flat parameters": ({"use_orig_params": False}, one_forward),
    "grad op": ({"use_orig_params": True, "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, one_forward),
    "bf16": ({"use_orig_params": True, "mixed_precision": MixedPrecision(torch.bfloat16)}, one_forward),
    "prefetch": (
        {
            "use_orig_params": True,
            "backward_prefetch": BackwardPrefetch.BACKWARD_PRE,
            "forward_prefetch": True,
        },
        one_forward,
    ),
    "prefetch after": (
        {"use_orig_params": True, "backward_prefetch": BackwardPrefetch.BACKWARD_POST},
        one_forward,
    ),
    "accumulate": ({"use_orig_params": True}, accumulate),
    "two forwards": ({"use_orig_params": True}, two_forwards),
}


def fsdp1_ways(options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    def after() -> Any:
        model = fsdp1(Model(), same, same, **options)
        apply(model, "_fsdp_wrapped_module.stack.layers.*._fsdp_wrapped_module")
        return model

    def call() -> Any:
        model = Model()
        model.stack.regions = 1
        return fsdp1(model, same, same, **options)

    def call_two(guarded: bool = True) -> Any:
        model = Model()
        model.stack.regions = 2
        model = fsdp1(model, same, same, **options)
        if guarded:
            guard_units(model)
        return model

    def coarser() -> Any:
        model = fsdp1(Model(), same, same, **options)
        guard_units(model)
        apply(model, "_fsdp_wrapped_module.stack")
        return model

    return {
        "call two": call_two,
        "call two, unguarded": lambda: call_two(guarded=False),
        "coarser": coarser,
        "inside, before": lambda: fsdp1(Model(), region, same, **options),
        "inside, after": after,
        "outside": lambda: fsdp1(Model(), same, region, **options),
        "wrapper inside": lambda: fsdp1(Model(), checkpoint_wrapper, same, **options),
        "wrapper outside": lambda: fsdp1(Model(), same, checkpoint_wrapper, **options),
        "composable": lambda: fsdp1(Model(), composable, same, **options),
        "call": call,
    }


class Skipping(Model):
    """Has a block that only even calls use, and one that none uses."""

    def __init__(self) -> None:
        super().__init__(4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = self.stack.layers
        x = layers[1](layers[0](self.embed(x)))
        if dc.pin(self.calls % 2 == 0):
            x = layers[2](x)
        if not dc.is_recomputing():
            self.calls += 1
        return self.head(self.norm(x))


class Shared(Model):
    """One block is used twice, and the head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.stack.layers[2] = self.stack.layers[1]


DDP_CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Step]] = {
    "plain": (Model, {}, one_forward),
    "unused": (Skipping, {"find_unused_parameters": True}, one_forward),
    "shared": (Shared, {}, one_forward),
    "shared, unused looked for": (Shared, {"find_unused_parameters": True}, one_forward),
    "static graph": (Model, {"static_graph": True}, one_forward),
    "static graph, shared": (Shared, {"static_graph": True}, one_forward),
    "no_sync": (Model, {}, accumulate),
    "bucket view": (Model, {"gradient_as_bucket_view": True}, accumulate),
    "small buckets": (Model, {"bucket_cap_mb": 0.001}, one_forward),
}


def ddp_ways(make: Callable[[], Any], options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    def plain() -> Any:
        return DDP(make(), **options)

    def before() -> Any:
        model = make()
        apply(model, "stack.layers.*")
        return DDP(model, **options)

    def after() -> Any:
        model = plain()
        apply(model, "module.stack.layers.*")
        return model

    def whole() -> Any:
        """One region around everything, nested ones inside, all inside DDP."""
        model = make()
        apply(model, ("", "stack.layers.*"))
        return DDP(model, **options)

    def wrapper() -> Any:
        model, wrapped = make(), {}
        for index, layer in enumerate(model.stack.layers):
            if layer not in wrapped:
                wrapped[layer] = checkpoint_wrapper(layer)
            model.stack.layers[index] = wrapped[layer]
        return DDP(model, **options)

    return {"none": plain, "before": before, "after": after, "whole": whole, "wrapper": wrapper}


def main() -> None:
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for name, (options, step) in FSDP1_CASES.items():
        plain = train(fsdp1(Model(), same, same, **options), step)
        ways = fsdp1_ways(options)
        found[f"fsdp1, {name}"] = {way: compare(train(make(), step), plain) for way, make in ways.items()}
    for name, (make, options, step) in DDP_CASES.items():
        ways = ddp_ways(make, options)
        plain = train(ways.pop("none")(), step)
        found[f"ddp, {name}"] = {way: compare(train(model(), step), plain) for way, model in ways.items()}
    report(found)
    leave()


if __name__ == "__main__":
    main()
    os._exit(0)
