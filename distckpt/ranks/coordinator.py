"""Coordinator: what the ranks of one job do together. A facade; each method's work is a room of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distckpt.engine.errors import BadOption
from distckpt.ranks.agreement import judge
from distckpt.ranks.alarm import Alarm
from distckpt.ranks.meeting import Channel, open_store
from distckpt.ranks.regionplan import RegionPlan
from distckpt.ranks.statement import collect
from distckpt.ranks.watch import Watch
from distckpt.ranks.world import World, detect

RULES = ("error", "warn", "all")


class Coordinator:
    """One per process: under torchrun, under ``torch_xla.launch``, or alone.

    Args:
        device_type: what this rank trains on; None finds it out: the model's, else the machine's accelerator.
        rule: ``"error"``, ``"warn"`` or ``"all"``: the single-device-type rule, over ranks.
        timeout: seconds that a check waits for the other ranks.
        world_size: the number of ranks that this job is fixed to; None takes the world as it is.
        alarm: after the first check, let a replay that fails on one rank end the others too; see ``ranks/alarm.py``.
        store: a ``torch.distributed.Store`` to meet through, instead of the default process group's.
        world: what to believe instead of the launcher and the running process group.

    Raises:
        BadOption: an unknown rule, or a timeout that is not positive.
        WorldMismatch: the launcher and the running process group disagree.

    Example:
        >>> coord = dc.Coordinator()
        >>> dc.apply(model, "layers.*")
        >>> coord.check(model)
    """

    def __init__(
        self,
        device_type: str | None = None,
        *,
        rule: str = "error",
        timeout: float = 60.0,
        world_size: int | None = None,
        alarm: bool = True,
        store: Any = None,
        world: World | None = None,
    ) -> None:
        if rule not in RULES:
            raise BadOption(f"unknown device rule {rule!r}", fix=f"use one of {', '.join(RULES)}")
        if not timeout > 0:
            raise BadOption(f"timeout is a number of seconds above 0, not {timeout!r}")
        self.device_type = device_type
        self.rule = rule
        self.timeout = timeout
        self._fixed_size = world_size
        self._wants_alarm = alarm
        self._alarm: Alarm | None = None
        self._store = store
        self._world = world
        self._channel: Channel | None = None
        _ = self.world

    @property
    def world(self) -> World:
        """This process among the ranks, looked up anew: a process group may have been made since.

        Raises:
            WorldMismatch: the launcher and the running process group disagree.
        """
        return self._world or detect()

    @property
    def rank(self) -> int:
        """This process's rank in the whole job, from 0."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """How many ranks the job has."""
        return self.world.size

    @property
    def restart(self) -> int:
        """How often torchrun has restarted the job."""
        return self.world.restart

    def check(
        self,
        model: torch.nn.Module | Mapping[Any, torch.nn.Module] | None = None,
        plan: RegionPlan | str | Path | None = None,
        *,
        mesh: Any = None,
        stage: Any = None,
    ) -> RegionPlan:
        """Agree with the other ranks before the first step, and again when the regions change. Every rank calls it.

        Compared are: world size, versions of torch and distckpt, device type (by the rule) and backends, names of the
        registered random streams, the regions on the model with their options, and ``plan``. Regions must be equal on
        all ranks of one pipeline stage, whatever their place in data, tensor or expert parallel groups. The model
        is only read. One message of a few hundred bytes per rank goes through the rendezvous store.

        Args:
            model: this rank's model or stage; or its stages, as a mapping of stage to module.
            plan: the plan that the model is to follow, with every stage: a RegionPlan, its JSON, or a file of it.
            mesh: a DeviceMesh; a dimension named pp, pipe, pipeline or stage names the stage of this rank.
            stage: the stage of this rank, where neither ``mesh`` nor a mapping says it.

        Returns:
            This rank's part of the plan.

        Raises:
            RanksDisagree, MixedRankDevices, PlansDiffer, StageMissing: a difference, with a diff by rank.
            PlanNotMet, BadPlan: the model has other regions than ``plan``, or that is none.
            WorldMismatch, WorldChanged: the world is not the one that was launched, or not the one that was fixed.
            RanksMissing: a rank did not come in time. NoStore: there is nowhere to meet.
            Every rank raises the same error, also one that is found on a single rank.
        """
        channel = self._open()
        own = collect(
            model,
            device_type=self.device_type,
            rule=self.rule,
            world=channel.world,
            world_size=self._fixed_size,
            plan=plan,
            mesh=mesh,
            stage=stage,
        )
        verdict = channel.meet("check", own.short(), judge, timeout=self.timeout, text=own.long)
        verdict.raise_error()
        for warned in verdict.warnings:
            warnings.warn(warned, stacklevel=2)
        self._start_alarm(channel)
        return own.plan

    def watch(self, *, every: int = 1) -> Watch:
        """Compare the collectives inside replays over ranks: ``with coord.watch(): loss = ...; loss.backward()``.

        Each is compared before it goes out, so that ranks about to enter different ones get an error instead of a
        hang or of each other's data. A debug mode: a meeting per collective costs a fraction of a millisecond up.

        Args:
            every: compare in groups of so many, cheaper and later. Equal on every rank.

        Raises:
            CollectivesDiffer: from inside the backward, or at the end of the block, on every rank of the group.
            RanksMissing: a rank of the group did not come to a collective in time.
        """
        if every < 1:
            raise BadOption(f"every is a number of collectives from 1, not {every!r}")
        channel = self._open()
        self._start_alarm(channel)
        return Watch(channel, every=every, timeout=self.timeout)

    def close(self) -> None:
        """Stop the alarm. Called by itself when the process ends."""
        if self._alarm is not None:
            self._alarm.stop()
            self._alarm = None

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> Channel:
        world = self.world
        if self._channel is None or self._channel.world != world:
            self.close()
            self._channel = Channel(self._store or open_store(world), world)
        return self._channel

    def _start_alarm(self, channel: Channel) -> None:
        if self._wants_alarm and self._alarm is None and channel.world.size > 1:
            self._alarm = Alarm(channel)

    def fully_shard(self, model: torch.nn.Module, units: Any, **options: Any) -> Any:
        """See :func:`distckpt.ranks.fsdp.fully_shard`."""
        from distckpt.ranks.fsdp import fully_shard

        return fully_shard(self, model, units, **options)

    def attach(self, schedule_or_stages: Any, **options: Any) -> Any:
        """See :func:`distckpt.ranks.pipeline.attach`."""
        from distckpt.ranks.pipeline import attach

        return attach(self, schedule_or_stages, **options)

    def streams(self, mesh: Any, seed: int, **options: Any) -> Any:
        """See :func:`distckpt.ranks.streams.seed_streams`."""
        from distckpt.ranks.streams import seed_streams

        return seed_streams(mesh, seed, **options)

    def check_streams(self) -> Any:
        """See :func:`distckpt.ranks.stream_check.check_streams`."""
        from distckpt.ranks.stream_check import check_streams

        return check_streams()

    def partition(self, group: Any, **options: Any) -> Any:
        """See :class:`distckpt.ranks.partition.Partition`."""
        from distckpt.ranks.partition import Partition

        return Partition(group, **options)

    def state_dict(self) -> dict[str, Any]:
        """See :func:`distckpt.ranks.streams.state_dict`."""
        from distckpt.ranks.streams import state_dict

        return state_dict(self)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """See :func:`distckpt.ranks.streams.load_state_dict`."""
        from distckpt.ranks.streams import load_state_dict

        load_state_dict(self, state, strict)
