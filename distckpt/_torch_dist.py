"""Private ``torch.distributed`` APIs: one name each, as in ``_torch.py``. Supported: torch 2.9 to 2.15.

What every version has stands in ``NAMES`` and is asked for with the feature; what was renamed is replaced below.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distckpt_backends.private import PrivateNames, version

from distckpt._torch import composable_contract

_UNIT, _FSDP1 = "torch.distributed.fsdp._fully_shard", "torch.distributed.fsdp"
_SCHEDULES, _STAGE = "torch.distributed.pipelining.schedules", "torch.distributed.pipelining.stage"
NAMES = PrivateNames(
    {
        "process groups": (
            "torch._C._distributed_c10d:_resolve_process_group",
            "torch.distributed.distributed_c10d:_get_default_store",
            "torch.distributed.distributed_c10d:_world.pg_map",
            "torch.distributed:ProcessGroup._device_types",
        ),
        "FSDP2 units": (
            f"{_UNIT}._fsdp_common:TrainingState",
            f"{_UNIT}._fsdp_param_group:FSDPParamGroup._training_state",
            f"{_UNIT}._fsdp_state:FSDPState._fsdp_param_group|_fsdp_param_groups",
            f"{_UNIT}._fsdp_state:FSDPState._register_root_post_backward_final_callback",
            f"{_UNIT}._fsdp_state:FSDPState._training_state",
            f"{_UNIT}._fsdp_state:_get_module_fsdp_state",
            "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
        ),
        "FSDP1 units": (
            f"{_FSDP1}._common_utils:HandleTrainingState",
            f"{_FSDP1}._flat_param:FlatParamHandle._prefetched",
            f"{_FSDP1}._flat_param:FlatParamHandle._training_state",
            f"{_FSDP1}._runtime_utils:_unshard",
        ),
        "DTensors": (
            "torch.distributed._functional_collectives:AsyncCollectiveTensor",
            "torch.distributed.tensor:DTensor._local_tensor",
            "torch.distributed.tensor._random:_rng_tracker",
            "torch.distributed.tensor._random:is_rng_supported_mesh",
            "torch.distributed.tensor._random:OffsetBasedRNGTracker",
        ),
        "pipeline stages": (
            f"{_SCHEDULES}:_ComputationType",
            f"{_SCHEDULES}:_PipelineScheduleRuntime._step_microbatches",
            f"{_SCHEDULES}:PipelineScheduleMulti._n_microbatches",
            f"{_SCHEDULES}:PipelineScheduleMulti._stages",
            f"{_SCHEDULES}:PipelineScheduleMulti._step_microbatches",
            f"{_SCHEDULES}:PipelineScheduleSingle._stage",
            f"{_SCHEDULES}:Schedule1F1B._step_microbatches",
            f"{_SCHEDULES}:ScheduleGPipe._step_microbatches",
            f"{_STAGE}:_PipelineStageBase.fwd_cache|_forward_chunk_states",
        ),
        "the rehearsal of a plan": (
            "torch._subclasses.fake_tensor:FakeTensorMode",
            "torch.testing._internal.distributed.fake_pg:FakeStore",
        ),
    }
)

# Before, FSDP2 takes a unit's call inside a replay for a forward: it gathers, reshards, and gathers again.
UNITS_IN_REPLAYS = version() >= (2, 13)
# What a schedule does with one micro-batch on one stage, as its own tables name it.
FORWARD, BACKWARD, INPUT_BACKWARD, WEIGHT_BACKWARD = "F", "B", "I", "W"


def default_store() -> Any:
    """The store that the default process group met through, or None when there is no such group.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    NAMES.need("process groups")
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def abort_groups() -> None:
    """Ask every process group to give up its collectives in flight.

    NCCL does (its communicators are aborted and kernels end); gloo accepts the call and goes on waiting.
    """
    NAMES.need("process groups")
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        try:
            group.abort()
        except (RuntimeError, AttributeError):  # a backend without it
            continue


def group_of_collective(args: Sequence[Any]) -> Any:
    """The process group in the arguments of a ``c10d`` or ``_c10d_functional`` operator, or None.

    The first hand over the group itself, boxed, the second its registered name, as the last string.
    """
    NAMES.need("process groups")
    from torch._C._distributed_c10d import _resolve_process_group

    for arg in args:
        if isinstance(arg, torch_script_object()):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:  # another boxed object: a reduce operation, a work handle
                continue
    names: list[Any] = [arg for arg in args if isinstance(arg, str)]
    if not names:
        return None
    try:
        return _resolve_process_group(names[-1])
    except (RuntimeError, ValueError):
        return None


def torch_script_object() -> type:
    """The type that boxed C++ objects arrive as in a dispatch mode."""
    import torch

    return torch.ScriptObject


@functools.cache
def fully_shard_options() -> tuple[str, ...]:
    """The keywords that this torch's ``fully_shard`` takes."""
    from torch.distributed.fsdp import fully_shard

    return tuple(inspect.signature(fully_shard).parameters)[1:]


def fsdp_state(module: torch.nn.Module) -> Any:
    """The FSDP2 state of a unit, or None. A grouped unit has one for all its modules."""
    NAMES.need("FSDP2 units")
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    return _get_module_fsdp_state(module)


def parameter_groups(state: Any) -> list[Any]:
    """What an FSDP2 unit gathers: mostly one group of parameters; several, or none, with newer versions."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older versions have one at most
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return groups


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without loading DTensors for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fsdp1(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a FullyShardedDataParallel wrapper, without loading FSDP for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def sharded_by(module: torch.nn.Module) -> str | None:
    """The API of torch's that already distributes ``module``'s parameters, or None."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, FullyShardedDataParallel | DistributedDataParallel):
        return type(module).__name__
    registry = composable_contract()._get_registry(module) or ()
    return next((name for name in ("fully_shard", "replicate") if name in registry), None)


def unit_enters_replay(state: Any) -> None:
    """Tell a unit that its next call is part of a running backward: gather if needed, and nothing else.

    In this state FSDP2 neither prefetches in forward order, nor registers hooks on the replay's graph, nor notes
    the call in the order that backward prefetch follows; a replay that stops early leaves nothing half done. The
    callback at the end of the backward puts the state back and reshards, so it is queued here: the unit's own
    backward, which queues it otherwise, may never come.
    """
    NAMES.need("FSDP2 units")
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state._training_state = TrainingState.PRE_BACKWARD
    state._register_root_post_backward_final_callback()
    for group in parameter_groups(state):
        if group._training_state is TrainingState.POST_BACKWARD:
            # It gathers once more, so the callback must find it unfinished and reshard it.
            group._training_state = TrainingState.IDLE


def fsdp1_unit(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a ``FullyShardedDataParallel``."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def fsdp1_unit_enters_replay(unit: Any) -> None:
    """The same for FSDP1: gather unless that was done, and let the call pass as one inside backward.

    Otherwise it gathers, reshards, and gathers again; and a replay that stops early leaves a state that the unit's
    own backward does not allow.
    """
    NAMES.need("FSDP1 units")
    from torch.distributed.fsdp._common_utils import HandleTrainingState
    from torch.distributed.fsdp._runtime_utils import _unshard

    handle = unit._handle
    if handle is None or handle._training_state is HandleTrainingState.BACKWARD_PRE:
        return
    handle._training_state = HandleTrainingState.BACKWARD_PRE
    if not handle._prefetched:
        _unshard(unit, handle, unit._unshard_stream, unit._pre_unshard_stream)
        handle._prefetched = True  # its own backward need not, and puts the flag back
    unit._device_handle.current_stream().wait_stream(unit._unshard_stream)


def all_gather(out: object, part: object, group: object, async_op: bool = False) -> Any:
    """Gather one tensor of each rank of ``group`` into one; the work to wait for when ``async_op``."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return gather(out, part, group=group, async_op=async_op)


def group_device_types(group: Any) -> tuple[str, ...]:
    """The device types whose tensors can travel through ``group``."""
    return tuple(device.type for device in group._device_types)


def plain_part(
    t: torch.Tensor, ranks: list[int]
) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]] | None:
    """The plain tensor that is all of ``t`` on each of ``ranks``, and what makes a detached ``t`` of it again.

    Of a DTensor that is replicated over a mesh dim with these ranks, and of a collective's result that may not have
    arrived yet (it is waited for, and comes back as a plain tensor). None for any other subclass.
    """
    NAMES.need("DTensors")
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    part, again, grad = t, _itself, t.requires_grad
    if isinstance(part, DTensor):
        mesh, placements = part.device_mesh, part.placements
        groups = [dist.get_process_group_ranks(mesh.get_group(i)) for i in range(mesh.ndim)]
        if not any(p.is_replicate() and g == ranks for p, g in zip(placements, groups, strict=True)):
            return None
        again = partial(
            DTensor.from_local,
            device_mesh=mesh,
            placements=placements,
            run_check=False,
            shape=part.shape,
            stride=part.stride(),
        )
        part = part._local_tensor
    if isinstance(part, AsyncCollectiveTensor):
        part = part.trigger_wait()

    def make(found: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = again(found)
        return made.requires_grad_() if grad else made

    return (part, make) if type(part) is torch.Tensor else None


def _itself(t: torch.Tensor) -> torch.Tensor:
    return t


def dtensor_tracker() -> Any:
    """DTensor's random state tracker, or None: it has none on a CPU mesh, nor before its first random operator."""
    try:
        NAMES.need("DTensors")
        from torch.distributed.tensor import _random
    except ImportError:  # a torch without distributed
        return None
    return _random._rng_tracker


def make_dtensor_tracker(mesh: Any) -> Any:
    """DTensor's tracker, made now where the device type of ``mesh`` can have one. None where it cannot.

    DTensor makes it in its first random operator otherwise, and that broadcasts rank 0's random state to all.
    """
    NAMES.need("DTensors")
    from torch.distributed.tensor import _random

    if _random._rng_tracker is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that a CPU mesh has no tracker
            if not _random.is_rng_supported_mesh(mesh):
                return None
        _random._rng_tracker = _random.OffsetBasedRNGTracker(mesh, run_state_sync=False)
    return _random._rng_tracker


def tracker_state(tracker: Any) -> Any:
    """What a tracker keeps beside the device generator: whether it is on, and the states that some versions hold."""
    if tracker is None:
        return None
    held = getattr(tracker, "rng_states", None) or {}
    return tracker.distribute_region_enabled, {tag: state.clone() for tag, state in held.items()}


def set_tracker_state(tracker: Any, state: Any) -> None:
    """Undo what happened since :func:`tracker_state`."""
    if tracker is None or state is None:
        return
    tracker.distribute_region_enabled, held = state
    if held:
        tracker.rng_states = {tag: kept.clone() for tag, kept in held.items()}


def pipelining() -> Any:
    """Torch's module of pipeline schedules.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    NAMES.need("pipeline stages")
    from torch.distributed.pipelining import schedules

    return schedules


def is_stage(value: object) -> bool:
    """Whether ``value`` is a pipeline stage of ``torch.distributed.pipelining``."""
    NAMES.need("pipeline stages")
    from torch.distributed.pipelining.stage import _PipelineStageBase

    return isinstance(value, _PipelineStageBase)


def schedule_stages(schedule: Any) -> list[Any]:
    """The stages that this rank runs under ``schedule``."""
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def schedule_kind(schedule: object) -> str | None:
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


def custom_computations(schedule: object) -> list[str]:
    """The computations for which somebody registered a function of their own (torch 2.10 and later)."""
    return [kind.name for kind in getattr(schedule, "_comp_type_to_function_map", ())]


def step_with(schedule: Any, wait: Callable[[Callable[[Any], None], Any], None]) -> Any:
    """The step of ``schedule`` with its waits given to ``wait(original, works)``; None if its step has no such wait.

    The step is the same code with another meaning of one global name, and so are the helpers that wait for it (1F1B has
    one from torch 2.15 on). Nothing of torch's own is changed, so other schedules in the process do not notice. A wait
    comes after the receives were posted and before their result is used, which is the only place where
    something can be done meanwhile: the works are made and waited for in there.
    """
    step = type(schedule)._step_microbatches
    original = step.__globals__.get(_WAIT)
    if original is None or "_step_microbatches" in schedule.__dict__:
        return None
    waiting = {
        name: found
        for name, found in step.__globals__.items()
        if isinstance(found, types.FunctionType)
        and found.__globals__ is step.__globals__
        and _names(step.__code__, name)
        and _names(found.__code__, _WAIT)
    }
    if not waiting and not _names(step.__code__, _WAIT):
        return None
    names = {**step.__globals__, _WAIT: lambda works: wait(original, works)}
    names |= {name: _with_names(found, names) for name, found in waiting.items()}
    return types.MethodType(_with_names(step, names), schedule)


_WAIT = "_wait_batch_p2p"


def _with_names(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """``function`` with ``names`` for its globals."""
    again = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    again.__kwdefaults__ = function.__kwdefaults__
    return again


def _names(code: types.CodeType, name: str) -> bool:
    return name in code.co_names or any(
        _names(part, name) for part in code.co_consts if isinstance(part, types.CodeType)
    )


def stage_ends(stage: Any, micro_batch: int) -> tuple[Any, Any]:
    """Outputs and inputs of the forward of ``micro_batch``, before its backward takes them.

    From torch 2.15 on an output that was sent is gone, and the edge of the graph that made it stands in its place.
    """
    states = getattr(stage, "_forward_chunk_states", None)
    if states is None:  # torch before 2.15
        return stage.fwd_cache[micro_batch]
    state = states[micro_batch]
    return state.stage_output_for_backward(), state.input_values


def sharded_units(module: torch.nn.Module) -> dict[torch.nn.Module, tuple[str, bool]]:
    """The units of FSDP in ``module``, outermost first: their names, and whether their parameters are gathered now.

    Of FSDP1 that is never said: it frees memory that its parameters still name.
    """
    NAMES.need("FSDP2 units")
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


def fake_store() -> Any:
    """A store for the ``"fake"`` process group backend, whose collectives return at once and move nothing.

    Importing it registers that backend; torch 2.9 knows the shapes of collectives on fake tensors only with the other
    import.
    """
    NAMES.need("the rehearsal of a plan")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def fake_tensors() -> Any:
    """A mode whose tensors have shapes and types and no memory."""
    NAMES.need("the rehearsal of a plan")
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
