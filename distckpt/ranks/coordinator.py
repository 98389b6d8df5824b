"""Coordinator: what the ranks of one job do together. A facade; each method's work is a room of its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from distckpt.errors import BadOption
from distckpt.ranks.consistency import Work, collect, judge, judge_work
from distckpt.ranks.fsdp import AS_UNITS
from distckpt.ranks.plan import RegionPlan
from distckpt.ranks.store import Channel, gather, open_store
from distckpt.ranks.watchdog import DesyncCheck, Watchdog, start
from distckpt.ranks.world import World, detect, group_size

if TYPE_CHECKING:
    from distckpt.modules.apply import Choice
    from distckpt.ranks.fsdp import Sharded
    from distckpt.ranks.fsdp_units import Units
    from distckpt.ranks.partition import Partition
    from distckpt.ranks.pipeline import Attached
    from distckpt.ranks.rng_states import Checked
    from distckpt.ranks.rng_streams import Seeded

T = TypeVar("T")

RULES = ("error", "warn", "all")


class Coordinator:
    """One per process: under torchrun, under ``torch_xla.launch``, or alone.

    Args:
        device_type: what this rank trains on; None finds it out: the model's, else the machine's accelerator.
        rule: ``"error"``, ``"warn"`` or ``"all"``: the single-device-type rule, over ranks.
        timeout: seconds that a check waits for the other ranks.
        world_size: the number of ranks that this job is fixed to; None takes the world as it is.
        alarm: after the first check or attach, let a replay that fails on one rank end the others too; see
            ``ranks/watchdog.py``.
        store: a ``torch.distributed.Store`` to meet through, instead of the default process group's.
        world: what to believe instead of the launcher and the running process group.

    Raises:
        BadOption: an unknown rule, a timeout that is no number of seconds above 0, or another wrong type.
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
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if not number or not math.isfinite(timeout) or timeout <= 0:
            raise BadOption(
                f"timeout is a number of seconds above 0, not {timeout!r}", fix="Coordinator(timeout=60.0)"
            )
        if device_type is not None and not isinstance(device_type, str):
            raise BadOption(
                f"device_type is the name of a device type or None, not {device_type!r}",
                fix='Coordinator("cuda"), and None to take that of the model',
            )
        if world_size is not None and (type(world_size) is not int or world_size < 1):
            raise BadOption(
                f"world_size is a number of ranks or None, not {world_size!r}", fix="world_size=8"
            )
        if not isinstance(alarm, bool):
            raise BadOption(f"alarm is True or False, not {alarm!r}", fix="Coordinator(alarm=False)")
        if store is not None and not (hasattr(store, "set") and hasattr(store, "get")):
            raise BadOption(
                f"store is a torch.distributed.Store or None, not {store!r}",
                fix="leave it out: ranks meet through the default process group's store",
            )
        if world is not None and not isinstance(world, World):
            raise BadOption(
                f"world is a distckpt.ranks.World or None, not {world!r}",
                fix="leave it out; world_size=8 fixes the number of ranks",
            )
        self.device_type = device_type
        self.rule = rule
        self.timeout = timeout
        self._fixed_size = world_size
        self._wants_alarm = alarm
        self._alarm: Watchdog | None = None
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
        registered random streams, the regions on the model with their options, ``plan``, and a signature of the model:
        modules' names, classes, training or eval, dropout, and parameters' dtypes, shapes and whether they are
        frozen. Regions and signatures must be equal on all ranks of one pipeline stage, whatever their place in
        data or tensor parallel groups; only shapes of plain tensors may differ along other dimensions of ``mesh``
        than the data-parallel ones. The model is only read. One message of a few hundred bytes per rank goes through
        the rendezvous store.

        Args:
            model: this rank's model or stage; or its stages, as a mapping of stage to module.
            plan: the plan that the model is to follow, with every stage: a RegionPlan, its JSON, or a file of it.
            mesh: a DeviceMesh with named dimensions; one named pp, pipe, pipeline or stage names the stage of this
                rank, and the others say which ranks have equal local shapes. Without it all ranks of a stage have.
            stage: the stage of this rank, where neither ``mesh`` nor a mapping says it.

        Returns:
            This rank's part of the plan.

        Raises:
            RanksDisagree, MixedRankDevices, PlansDiffer, ModelsDiffer, StageMissing: a difference, with a diff by rank.
            PlanNotMet, BadPlan: the model has other regions than ``plan``, or that is none.
            WorldMismatch, WorldChanged: the world is not the one that was launched, or not the one that was fixed.
            RanksMissing: a rank did not come in time, or was killed or stopped while it was there.
            NoStore: there is nowhere to meet.
            RankFailed: something that is none of distckpt's errors happened on one rank.
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
        verdict.raise_error(own.cause)
        for warned in verdict.warnings:
            warnings.warn(warned, stacklevel=2)
        self._start_alarm(channel)
        return own.plan

    def watch(self, *, every: int = 1) -> DesyncCheck:
        """Compare the collectives inside replays over ranks: ``with coord.watch(): loss = ...; loss.backward()``.

        Each is compared before it goes out, so that ranks about to enter different ones get an error instead of a
        hang or of each other's data. A debug mode: a meeting per collective costs a fraction of a millisecond up.

        Args:
            every: compare in groups of so many, cheaper and later. Equal on every rank.

        Raises:
            CollectivesDiffer: from inside the backward, or at the end of the block, on every rank of the group.
            RanksMissing: a rank of the group did not come to a collective in time.
        """
        if type(every) is not int or every < 1:
            raise BadOption(
                f"every is a number of collectives from 1, not {every!r}", fix="every=1 compares each"
            )
        channel = self._open()
        self._start_alarm(channel)
        return DesyncCheck(channel, every=every, timeout=self.timeout)

    def close(self) -> None:
        """Stop the alarm, unless another coordinator of this process uses it. Done by itself when the process ends."""
        if self._alarm is not None and self._channel is not None:
            self._alarm.stop(self._channel)
        self._alarm = None

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> Channel:
        world = self.world
        if self._channel is None or self._channel.world != world:
            self.close()
            self._channel = Channel(self._store or open_store(world, self.timeout), world)
        return self._channel

    def _start_alarm(self, channel: Channel) -> None:
        if self._wants_alarm and self._alarm is None and channel.world.size > 1:
            self._alarm = start(channel)

    def _together(
        self, topic: str, work: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] = lambda done: {}
    ) -> T:
        """Do ``work`` on every rank, and return when it is done on all and its ``facts`` are equal over ranks.

        Raises:
            PlansDiffer: the facts differ. RanksMissing: a rank did not come.
            Every rank raises the same error, also one of a single rank. ``done`` is left to the caller.
        """
        channel = self._open()
        said = Work.of(work, facts)
        channel.meet(topic, said.short(), judge_work, timeout=self.timeout).raise_error(said.cause)
        return said.done

    def fully_shard(
        self,
        model: torch.nn.Module,
        units: Units,
        plan: Any = None,
        *,
        regions: Choice | None = AS_UNITS,
        overrides: Mapping[Any, Mapping[str, Any]] | None = None,
        policy: Any = None,
        **options: Any,
    ) -> Sharded:
        """Shard ``model`` with FSDP2, a unit per module that ``units`` names and one for the rest, with regions inside.

        Args:
            units: modules, as for ``dc.apply``. A tuple or list inside it makes one unit of all that it matches.
            plan, policy: reserved; only None.
            regions: the modules to make regions, as for ``dc.apply``; None for none. Left out: the units' modules.
            overrides: FSDP2 options for some units only: ``{"layers.11": {"reshard_after_forward": False}}``.
            options: every option of the installed torch's ``fully_shard``, and those of ``dc.apply``.

        Returns:
            A handle that says what was done; its ``remove()`` takes the regions off.

        Raises:
            DistckptError: DC420 to DC425, and what ``dc.apply`` raises; the model is as it was. See
                :func:`distckpt.ranks.fsdp.fully_shard`.
        """
        from distckpt.ranks.fsdp import fully_shard

        return fully_shard(
            self, model, units, regions=regions, overrides=overrides, policy=policy, plan=plan, **options
        )

    def attach(
        self,
        schedule_or_stages: Any,
        *,
        plan: Mapping[int, Choice] | None = None,
        early_replay: bool = True,
        ahead: int | str | None = None,
    ) -> Attached:
        """One replay per region and micro-batch, for a pipeline of ``torch.distributed.pipelining``.

        Every rank calls it. The ranks agree first: on the plan for all stages, and on the other options where they
        have one stage. Then the alarm is on, as after :meth:`check`.

        Args:
            schedule_or_stages: a schedule, or this rank's stages for a schedule of your own.
            plan: what becomes a region, for every stage of the pipeline; None leaves the stages as they are.
            early_replay: replay before the gradient arrives.
            ahead: most bytes of region values that may exist before their gradient: a number, ``"2 GiB"``, or
                ``"1 micro-batch"``.

        Returns:
            A handle with ``report()`` and ``remove()``.

        Raises:
            PlansDiffer: ranks have other plans, or other options for one stage. RanksMissing, RankFailed: as in
                :meth:`check`.
            DistckptError: DC430 to DC433, and what ``dc.apply`` raises. After any error everything is as it was, on
                every rank. See :func:`distckpt.ranks.pipeline.attach`.
        """
        from distckpt.ranks.pipeline import attach

        handle: list[Attached] = []

        def work() -> Attached:
            handle.append(attach(self, schedule_or_stages, plan=plan, early_replay=early_replay, ahead=ahead))
            return handle[0]

        try:
            attached = self._together("attach", work, lambda attached: attached.facts)
        except BaseException:
            for made in handle:
                made.remove()
            raise
        self._start_alarm(self._open())
        return attached

    def streams(
        self,
        mesh: Any,
        seed: int,
        *,
        streams: Mapping[str, Iterable[str]] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> Seeded:
        """Seed the named random streams of this rank by its coordinates in ``mesh``.

        It does not use the coordinator: a seed follows from coordinates alone, and :meth:`check_streams` compares.

        Args:
            mesh: a DeviceMesh with named dimensions; None in a job of one process.
            seed: any int; the same on every rank.
            streams: name of each stream to the dimensions over which it differs.
            aliases: further names of mesh dimensions: ``{"my_dim": "dp"}``.

        Returns:
            A handle with ``remove()``.

        Raises:
            BadStreams, StreamInUse: see :func:`distckpt.ranks.rng_streams.seed_streams`.
        """
        from distckpt.ranks.rng_streams import seed_streams

        return seed_streams(mesh, seed, streams=streams, aliases=aliases)

    def check_streams(self) -> list[Checked]:
        """Draw from a copy of every named stream on every rank and compare. No stream moves. Every rank calls it.

        Returns:
            One row per stream: ``groups`` are the ranks that draw the same, as the name promises.

        Raises:
            StreamsDisagree: on every rank, naming ranks (DC453). RanksMissing, RankFailed: as in :meth:`check`.
            StreamInUse: on every rank, when one is inside a block (DC451).
        """
        from distckpt.ranks.rng_states import compare, drawn

        return compare(gather(self._ready("check_streams", drawn)))

    def partition(
        self, group: Any, *, min_bytes: int = 65536, prefetch: bool = True, check: str = "first"
    ) -> Partition:
        """A partition: regions keep 1/t of their inputs on each of the t ranks of ``group``.

        It does not use the coordinator: the ranks of ``group`` compare their inputs through the group itself, and
        :meth:`check` compares a partition's settings as options of the regions that have it.

        Args:
            group: a process group, or a mesh of one dimension (``mesh["tp"]``).
            min_bytes: smaller tensors are kept whole; the same on every rank.
            prefetch: start the gather of the region recorded before the one that is replayed.
            check: ``"first"``, ``"always"``, ``"leave"`` or ``"never"``: whether inputs are compared over the group.

        Raises:
            BadPartition: not a group of this rank, or a bad option. See :class:`distckpt.ranks.partition.Partition`.
        """
        from distckpt.ranks.partition import Partition

        return Partition(group, min_bytes=min_bytes, prefetch=prefetch, check=check)

    def state_dict(self) -> dict[str, Any]:
        """The states of every random stream on every rank, as plain data. Every rank calls it.

        Returns:
            ``{"version": int, "world": int, "states": bytes}``, equal on all ranks.

        Raises:
            UnsavableStream: on every rank, when the state of a source is no plain data on one (DC454).
            StreamInUse: on every rank, when one is inside a block (DC451).
            RanksMissing, RankFailed: as in :meth:`check`.
        """
        from distckpt.ranks.rng_states import own_state, together

        return together(self._ready("state_dict", own_state))

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Put this rank's random states back; everything or, after an error, nothing. They are read as data.

        It does not use the coordinator: the value holds the states of every rank, so a rank may load it alone.

        Args:
            state: what :meth:`state_dict` gave, on any rank.
            strict: refuse a state of another number of ranks, of other streams or of another place in the mesh.

        Raises:
            WrongState: it does not fit, and why (DC455). StreamInUse: inside a block of a stream (DC451).
        """
        from distckpt.ranks.rng_states import load_state_dict

        load_state_dict(state, strict)

    def _ready(self, topic: str, work: Callable[[], T]) -> T:
        """Do ``work`` before a gather through the process group; where there is none, this rank is alone."""
        return work() if group_size() == 1 else self._together(topic, work)
