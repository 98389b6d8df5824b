"""UnitGuard: what makes an FSDP2 unit know a replay from a forward.

A region that has units inside it calls them again in its replay. FSDP2 tells a unit that "this is backward" when the
gradient reaches the unit's output, which is after the replay has called it. Until then the call looks like a
forward: it prefetches what ``set_modules_to_forward_prefetch`` named, which in backward order has been used already and
would be gathered for nothing. (Megatron-FSDP had the same mistake, and left such units gathered: Megatron-LM #6153.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from distckpt._torch import graph_task_id, opaque_to_dynamo
from distckpt._torch_dist import (
    UNITS_IN_REPLAYS,
    fsdp1_unit,
    fsdp1_unit_enters_replay,
    fsdp_state,
    unit_enters_replay,
)
from distckpt.engine import is_recomputing
from distckpt.errors import GatherOutsideBackward, NotAModel


class UnitGuard:
    """A forward pre-hook on one unit, ahead of FSDP2's own. Outside a replay it is one function call.

    ``enter`` tells the unit that a replay is about to call it, within a backward.
    """

    __slots__ = ("enter", "name")

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        self.name = name
        self.enter = enter

    @opaque_to_dynamo
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not is_recomputing():
            return
        if graph_task_id() == -1:
            raise GatherOutsideBackward(
                f"a replay outside a backward called the FSDP unit {self.name!r}",
                why="the unit would be gathered as in a forward, and backward would not know its order any more",
                fix="let the backward replay this region, or make the unit the region",
            )
        self.enter()


def guard_units(model: torch.nn.Module) -> tuple[RemovableHandle, ...]:
    """Guard every FSDP2 and FSDP1 unit of ``model``; returns the hooks' handles, each with ``remove()``.

    ``coord.fully_shard`` does this by itself. Call it once for a model that was sharded by hand and has regions with
    units inside them. Before torch 2.13 FSDP2 units cannot be helped and are left alone.

    Raises:
        NotAModel: it is no module (DC305).
    """
    if not isinstance(model, torch.nn.Module):
        raise NotAModel(
            f"dc.guard_units guards the units of a model, and was given a {type(model).__name__}",
            fix="dc.guard_units(model)",
        )
    found = ((name, module, _entrance(module)) for name, module in model.named_modules())
    return tuple(
        module.register_forward_pre_hook(UnitGuard(name, enter), prepend=True)
        for name, module, enter in found
        if enter is not None and not any(isinstance(h, UnitGuard) for h in module._forward_pre_hooks.values())
    )


def _entrance(module: torch.nn.Module) -> Callable[[], None] | None:
    if fsdp1_unit(module):
        return partial(fsdp1_unit_enters_replay, module)
    state = fsdp_state(module)
    return partial(unit_enters_replay, state) if state is not None and UNITS_IN_REPLAYS else None
