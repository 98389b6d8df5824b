"""One rank of the FSDP2 tests: every case once without regions, and with regions put on in several ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from distckpt._torch_dist import UNITS_IN_REPLAYS
from distckpt.compat.wrapper import checkpoint_wrapper, composable_checkpoint
from distckpt.modules import apply
from distckpt.ranks import Coordinator
from distckpt.ranks.fsdp import guard_units
from tests.ranks.sharded import (
    FLAT,
    NESTED,
    Model,
    accumulate,
    by_hand,
    compare,
    named,
    one_forward,
    train,
    two_forwards,
)
from tests.ranks.spawn import leave, report

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)


def nothing(model: Any) -> None: ...


def freeze(model: Any) -> None:
    """As with LoRA: small parameters are trained, and nothing before the first of them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("gain", "head.weight")))


def freeze_below(model: Any) -> None:
    """Only the head and the last block are trained: the others' outputs need no gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("stack.layers.3", "head")))


def tie(model: Any) -> None:
    """One parameter twice in the root unit, and one twice in a block."""
    model.head.weight = model.embed.weight
    model.stack.layers[0].mlp.weight = torch.nn.Parameter(model.stack.layers[0].attn.up.weight.detach())
    model.stack.layers[0].attn.up.weight = model.stack.layers[0].mlp.weight


def prefetch(model: Any) -> None:
    """Every layer names its neighbours, each way."""
    layers = list(model.stack.layers)
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 3])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - 2) : index][::-1])


def prefetch_nested(model: Any) -> None:
    """Each unit names the two that follow in forward order, so attention names a unit of the next layer."""
    order = [unit for layer in model.stack.layers for unit in (layer, layer.attn, layer.mlp)]
    for index, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[index + 1 : index + 3])


@dataclass
class Case:
    units: tuple[Any, ...] = FLAT
    regions: Any = "stack.layers.*"
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Any], None] = nothing  # on the plain model
    after: Callable[[Any], None] = nothing  # on the sharded model
    step: Callable[..., None] = one_forward


CASES = {
    "flat": Case(),
    "reshard": Case(options={"reshard_after_forward": True}),
    "keep": Case(options={"reshard_after_forward": False}),
    "bf16": Case(options={"mp_policy": BF16}),
    "mixed": Case(options={"mp_policy": MIXED}),
    "cpu offload": Case(options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "frozen": Case(before=freeze),
    "frozen below": Case(before=freeze_below),
    "tied": Case(before=tie, regions=("stack.layers.0", "stack.layers.1")),
    "accumulate": Case(step=accumulate),
    "two forwards": Case(step=two_forwards),
    "prefetch": Case(after=prefetch),
    "grouped": Case(units=(*FLAT, ("norm", "head")), regions=("stack.layers.*", "norm", "head")),
    "finer": Case(regions=("stack.layers.*.attn", "stack.layers.*.mlp")),
    "nested regions": Case(regions=("stack.layers.*", "stack.layers.*.attn")),
    "nested": Case(units=NESTED),
    "nested bf16": Case(units=NESTED, options={"mp_policy": BF16}),
    "nested mixed": Case(units=NESTED, options={"mp_policy": MIXED}),
    "nested keep": Case(units=NESTED, options={"reshard_after_forward": False}),
    "nested frozen": Case(units=NESTED, before=freeze),
    "nested frozen below": Case(units=NESTED, before=freeze_below),
    "nested accumulate": Case(units=NESTED, step=accumulate),
    "nested two forwards": Case(units=NESTED, step=two_forwards),
    "nested prefetch": Case(units=NESTED, after=prefetch_nested),
    "coarser": Case(regions="stack"),
    "coarser, nested": Case(units=NESTED, regions=("stack", "stack.layers.*")),
    "coarser, prefetch": Case(regions="stack", after=prefetch),
    "coarser, two forwards": Case(regions="stack", step=two_forwards),
    "coarser, whole model": Case(units=(*FLAT, ("norm", "head")), regions=""),
}
NEEDS_UNITS_IN_REPLAYS = [
    name for name in CASES if name.startswith(("nested ", "coarser")) or name == "nested"
]
NEEDS_UNITS_IN_REPLAYS.remove("nested regions")


def plain(case: Case) -> Any:
    model = Model()
    case.before(model)
    by_hand(model, case.units, **case.options)
    case.after(model)
    return model


def coord(case: Case) -> Any:
    model = Model()
    case.before(model)
    Coordinator(device_type="cpu").fully_shard(model, case.units, regions=case.regions, **case.options)
    case.after(model)
    return model


def before(case: Case) -> Any:
    model = Model()
    case.before(model)
    apply(model, case.regions)
    by_hand(model, case.units, **case.options)
    case.after(model)
    guard_units(model)
    return model


def after(case: Case) -> Any:
    model = plain(case)
    guard_units(model)
    apply(model, case.regions)
    return model


def wrapper_inside(case: Case) -> Any:
    """``checkpoint_wrapper``, then ``fully_shard`` on the wrapper."""
    model = Model()
    for index, layer in enumerate(model.stack.layers):
        model.stack.layers[index] = fully_shard(checkpoint_wrapper(layer), **case.options)
    fully_shard(model, **case.options)
    return model


def wrapper_outside(case: Case) -> Any:
    """``fully_shard``, then ``checkpoint_wrapper`` around the unit."""
    model = plain(case)
    guard_units(model)
    for index, layer in enumerate(model.stack.layers):
        model.stack.layers[index] = checkpoint_wrapper(layer)
    return model


def composable(case: Case) -> Any:
    model = plain(case)
    guard_units(model)
    for layer in model.stack.layers:
        composable_checkpoint(layer)
    return model


def call(case: Case) -> Any:
    """``dc.checkpoint(layer, x)`` in the model's own forward: the region is around the unit's hooks."""
    model = plain(case)
    guard_units(model)
    model.stack.regions = 1
    return model


def call_two(case: Case) -> Any:
    """Two units in one such call."""
    model = plain(case)
    model.stack.regions = 2
    guard_units(model)
    return model


def unguarded(case: Case) -> Any:
    """Regions around units, and nothing said to the units."""
    model = plain(case)
    apply(model, case.regions)
    return model


def overridden(case: Case) -> Any:
    model = Model()
    Coordinator().fully_shard(
        model, "stack.layers.*", overrides={"stack.layers.3": {"reshard_after_forward": False}}
    )
    return model


def overridden_plain(case: Case) -> Any:
    model = Model()
    for index, layer in enumerate(named(model, FLAT)):
        fully_shard(layer, reshard_after_forward=index != 3)
    fully_shard(model)
    return model


def main() -> None:
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        if name in NEEDS_UNITS_IN_REPLAYS and not UNITS_IN_REPLAYS:
            continue
        reference = train(plain(case), case.step)
        ways = [coord, before, after]
        if name in ("flat", "reshard", "keep", "bf16", "accumulate", "two forwards", "prefetch"):
            ways += [wrapper_inside, wrapper_outside, composable, call]
            ways += [call_two] if UNITS_IN_REPLAYS else []
            if name == "prefetch":  # the lists would name the wrapped modules
                ways.remove(wrapper_inside)
        if name in ("nested", "nested prefetch"):
            ways += [wrapper_outside, composable, call]
        if name == "nested prefetch":
            ways.append(unguarded)
        found[name] = {way.__name__: compare(train(way(case), case.step), reference) for way in ways}
    reference = train(overridden_plain(CASES["flat"]))
    found["override"] = {"coord": compare(train(overridden(CASES["flat"])), reference)}
    report(found)
    leave()


if __name__ == "__main__":
    main()
    os._exit(0)
