"""The one room for private APIs of ``torch.distributed``: one function each, with what it is for.

Supported: torch 2.9 to 2.15. What a version lacks is left out or answered with None; the caller says so to people.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# What a schedule does with one micro-batch on one stage, as its own tables name it.
FORWARD, BACKWARD, INPUT_BACKWARD, WEIGHT_BACKWARD = "F", "B", "I", "W"


def pipelining() -> Any:
    """Torch's module of pipeline schedules.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    from torch.distributed.pipelining import schedules

    return schedules


def is_stage(value: Any) -> bool:
    """Whether ``value`` is a pipeline stage of ``torch.distributed.pipelining``."""
    from torch.distributed.pipelining.stage import _PipelineStageBase

    return isinstance(value, _PipelineStageBase)


def schedule_stages(schedule: Any) -> list[Any]:
    """The stages that this rank runs under ``schedule``."""
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def schedule_kind(schedule: Any) -> str | None:
    """How a schedule orders its work, by the step function that it runs: ``"gpipe"``, ``"1f1b"`` or ``"table"``.

    None for what is no schedule, or one with a step function of its own.
    """
    known = pipelining()
    step = getattr(type(schedule), "_step_microbatches", None)
    kinds = {
        known.ScheduleGPipe._step_microbatches: "gpipe",
        known.Schedule1F1B._step_microbatches: "1f1b",
        known.PipelineScheduleMulti._step_microbatches: "table",
        known._PipelineScheduleRuntime._step_microbatches: "table",
    }
    return kinds.get(step)  # type: ignore[arg-type]


def schedule_table(schedule: Any) -> list[tuple[str, int, int]]:
    """What this rank computes in one step of a schedule that has a table: (what, stage, micro-batch), in order."""
    table = getattr(schedule, "pipeline_order_with_comms", None) or schedule.pipeline_order
    return [found for action in table[schedule.rank] for found in _computations(action)]


def _computations(action: Any) -> Iterator[tuple[str, int, int]]:
    if action is None:
        return
    kinds = pipelining()._ComputationType
    parts = getattr(action, "sub_actions", None)  # two computations that may overlap, from 2.9
    if parts:
        for part in parts:
            yield from _computations(part)
        return
    names = {
        kinds.FORWARD: FORWARD,
        kinds.FULL_BACKWARD: BACKWARD,
        kinds.BACKWARD_INPUT: INPUT_BACKWARD,
        kinds.BACKWARD_WEIGHT: WEIGHT_BACKWARD,
    }
    if action.computation_type in names:
        yield names[action.computation_type], action.stage_index, action.microbatch_index


def micro_batches(schedule: Any) -> int:
    """How many micro-batches one step of ``schedule`` has."""
    return schedule._n_microbatches


def custom_computations(schedule: Any) -> list[str]:
    """The computations for which somebody registered a function of their own (torch 2.10 and later)."""
    return [kind.name for kind in getattr(schedule, "_comp_type_to_function_map", ())]


def step_with(schedule: Any, wait: Callable[[Callable[[Any], None], Any], None]) -> Any:
    """The step of ``schedule`` with its waits given to ``wait(original, works)``; None if its step has no such wait.

    The step is the same code with another meaning of one global name. Nothing of torch's own is changed, so other
    schedules in the process do not notice. A wait comes after the receives were posted and before their result is
    used, which is the only place where something can be done meanwhile: the works are made and waited for in there.
    """
    step = type(schedule)._step_microbatches
    original = step.__globals__.get("_wait_batch_p2p")
    if (
        original is None
        or "_step_microbatches" in schedule.__dict__
        or not _names(step.__code__, "_wait_batch_p2p")
    ):
        return None
    names = {**step.__globals__, "_wait_batch_p2p": lambda works: wait(original, works)}
    again = types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
    again.__kwdefaults__ = step.__kwdefaults__
    return types.MethodType(again, schedule)


def _names(code: types.CodeType, name: str) -> bool:
    return name in code.co_names or any(
        _names(part, name) for part in code.co_consts if isinstance(part, types.CodeType)
    )


def stage_ends(stage: Any, micro_batch: int) -> tuple[Any, Any]:
    """Outputs and inputs of the forward of ``micro_batch``, before its backward takes them."""
    return stage.fwd_cache[micro_batch]


def sharded_units(module: torch.nn.Module) -> dict[torch.nn.Module, tuple[str, bool]]:
    """The units of FSDP in ``module``, outermost first: their names, and whether their parameters are gathered now.

    Of FSDP1 that is never said: it frees memory that its parameters still name.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    found: dict[torch.nn.Module, tuple[str, bool]] = {}
    for name, part in module.named_modules():
        unit: Any = part
        if isinstance(unit, FSDPModule):
            state: Any = unit._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # torch before 2.12: one group, or none for a unit without parameters
                groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
            found[part] = name, all(group.is_unsharded for group in groups)
        elif isinstance(unit, FullyShardedDataParallel):
            found[part] = name, False
    return found
