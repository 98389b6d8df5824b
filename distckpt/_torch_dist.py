"""Private ``torch.distributed`` APIs: one name each, as in ``_torch.py``. Supported: torch 2.9 to 2.15."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from distckpt._torch import composable_contract

# Before, FSDP2 takes a unit's call inside a replay for a forward: it gathers, reshards, and gathers again.
UNITS_IN_REPLAYS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def default_store() -> Any:
    """The store that the default process group met through, or None when there is no such group.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def abort_groups() -> None:
    """Ask every process group to give up its collectives in flight.

    NCCL does (its communicators are aborted and kernels end); gloo accepts the call and goes on waiting.
    """
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
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    return _get_module_fsdp_state(module)


def parameter_groups(state: Any) -> list[Any]:
    """What an FSDP2 unit gathers: mostly one group of parameters; several, or none, with newer versions."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older versions have one at most
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return groups


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
