"""World: who launched this process, which rank it is of how many, and whether the running group says the same."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from distckpt.errors import WorldChanged, WorldMismatch


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What a running communication runtime says: its name for messages, this process's rank, the world's size."""

    name: str
    rank: int
    size: int


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the ranks of a job.

    ``launcher`` is ``"torchrun"``, ``"environment"`` (``RANK`` and ``WORLD_SIZE`` set by hand or by a cluster),
    ``"torch_xla.launch"``, ``"process group"`` (made without any of these) or ``"alone"``. ``restart`` counts elastic
    restarts and ``run`` names the job; together they keep one round's messages from another's.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"
    restart: int = 0
    run: str = "none"
    fresh_store: bool = False

    @property
    def round(self) -> str:
        """A name for this start of the job's processes, the same on every rank and another after an elastic restart.

        Each torchrun agent counts the restarts that its own workers caused, so agents of one job differ in that after
        the first; with ``fresh_store`` (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``) every start has a store of its own,
        and nothing needs to be told apart. Nodes that join or leave are no restart, so the size is part of it.
        """
        if self.launcher != "torchrun":
            return str(self.restart)
        return f"{'new' if self.fresh_store else self.restart}-{self.size}"

    def require_size(self, size: int | None, what: str) -> None:
        """Refuse a world of another size than ``what`` was made for; None fits every world.

        Raises:
            WorldChanged: the sizes differ.
        """
        if size is None or size == self.size:
            return
        how = "shrank" if self.size < size else "grew"
        restarted = f", elastic restart {self.restart}" if self.restart else ""
        raise WorldChanged(
            f"the world {how}: {what} is for {size} ranks, and there are {self.size}",
            where=f"started by {self.launcher}{restarted}",
            fix="make it again for this number of ranks, or start as many ranks as it is for",
        )


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_rank() -> int:
    """The global rank of this process in the default process group; 0 without one."""
    return dist.get_rank() if _started() else 0


def group_size() -> int:
    """The number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if _started() else 1


def runtime() -> Runtime | None:
    """What runs now: the default process group, else a torch_xla runtime that is in use, else None.

    Never initialises anything. Under SPMD torch_xla's world is no world of processes, so it is not asked.
    """
    if _started():
        return Runtime("torch.distributed", dist.get_rank(), dist.get_world_size())
    xla: Any = sys.modules.get("torch_xla")
    xr: Any = sys.modules.get("torch_xla.runtime")
    if xla is None or xr is None or not xla._XLAC._xla_runtime_is_initialized() or xr.is_spmd():
        return None
    return Runtime("torch_xla", xr.global_ordinal(), xr.world_size())


def detect(
    environment: Mapping[str, str] | None = None, ask: Callable[[], Runtime | None] = runtime
) -> World:
    """The world as the launcher's environment describes it, checked against what runs.

    ``init_process_group("xla", init_method="xla://")`` under torchrun on a platform that ignores the launcher makes
    every process rank 0 of a world of 1; its collectives then reduce over themselves. That is refused here.

    Raises:
        WorldMismatch: the default process group has another rank or size than the launcher gave.
    """
    env = os.environ if environment is None else environment
    found = ask()
    restart = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if "RANK" not in env or "WORLD_SIZE" not in env:
        if found is None:
            return World()
        xla = found.name == "torch_xla" or "PJRT_LOCAL_PROCESS_RANK" in env
        launcher = "torch_xla.launch" if xla else "process group"
        local = int(env.get("PJRT_LOCAL_PROCESS_RANK", found.rank))
        return World(found.rank, found.size, local, launcher, restart)
    world = World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment",
        restart=restart,
        run=env.get("TORCHELASTIC_RUN_ID", "none"),
        fresh_store=env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1",
    )
    # Without a group torch_xla says rank 0 of 1 whatever it is part of, so only a group contradicts a launcher.
    if (
        found is not None
        and found.name != "torch_xla"
        and (found.rank, found.size) != (world.rank, world.size)
    ):
        raise _mismatch(world, found)
    return world


def _mismatch(world: World, found: Runtime) -> WorldMismatch:
    return WorldMismatch(
        f"{world.launcher} started rank {world.rank} of {world.size}, but {found.name} runs as rank {found.rank} "
        f"of {found.size}",
        where=f"local rank {world.local_rank}",
        why="collectives of the smaller world leave the other processes out without a word; a process group over "
        "xla:// is like this where the platform ignores the launcher (PJRT_DEVICE=CPU)",
        fix="start one process per device with torch_xla.launch, or initialise the group over env://; for a group "
        "that is meant to be another, pass Coordinator(world=World(...))",
    )
