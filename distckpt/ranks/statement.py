"""Statement: what one rank says about itself when the ranks agree. Short whatever the model's size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from distckpt_backends import get as backend_for

import distckpt
from distckpt.engine import streams
from distckpt.engine.devices import DefaultDeviceType, device_types
from distckpt.errors import BadOption, MixedRankDevices, PlanNotMet, StageMissing
from distckpt.ranks.regionplan import RegionPlan, canonical, describe, differences, digest, plain
from distckpt.ranks.signature import Place, Signature, dimensions
from distckpt.ranks.store import Verdict, failed
from distckpt.ranks.world import World

# Mesh dimensions along which the plans are free to differ: each coordinate is a pipeline stage.
STAGE_DIMENSIONS = ("pp", "pipe", "pipeline", "stage")


@dataclasses.dataclass(frozen=True)
class Statement:
    """The message (:meth:`short`), and what stands behind its hashes (:meth:`long`), sent on disagreement only.

    ``failure`` is what is wrong on this rank already, so that the others raise it too instead of waiting; ``cause`` is
    the exception behind it, which stays here.
    """

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    streams: tuple[str, ...] = ()
    plan: RegionPlan = dataclasses.field(default_factory=lambda: RegionPlan({}))
    given: str | None = None
    models: Mapping[str, Signature] = dataclasses.field(default_factory=dict)
    place: Place | None = None
    failure: dict[str, Any] | None = None
    cause: Exception | None = None

    def short(self) -> bytes:
        """A few hundred bytes: facts, hashes, and three hashes per stage that this rank has."""
        if self.failure is not None:
            return canonical({"failure": self.failure}).encode()
        said = {
            **self.facts,
            "streams": digest(canonical(self.streams)),
            "given": None if self.given is None else digest(self.given),
            "plan": {stage: digest(canonical(regions)) for stage, regions in self.plan.stages.items()},
            "models": {stage: signature.hashes() for stage, signature in self.models.items()},
            "place": None if self.place is None else [self.place.structure, self.place.shapes],
        }
        return canonical(said).encode()

    def long(self) -> bytes:
        """Names of the streams, the given plan, and the regions and the signature of every stage of this rank."""
        given = None if self.given is None else json.loads(self.given)["stages"]
        models = {stage: [s.structure, s.shapes] for stage, s in self.models.items()}
        said = {"streams": self.streams, "given": given, "plan": self.plan.stages, "models": models}
        return canonical(said).encode()


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Work(Generic[T]):
    """What came of some work on this rank: facts that are to be equal over ranks, or what went wrong."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failure: dict[str, Any] | None = None
    cause: Exception | None = None
    result: T | None = None

    @classmethod
    def of(cls, work: Callable[[], T], facts: Callable[[T], Mapping[str, Any]]) -> Work[T]:
        """Do the work. Nothing is raised: the other ranks wait for what this one says."""
        try:
            done = work()
            return cls({name: canonical(plain(value)) for name, value in facts(done).items()}, result=done)
        except Exception as error:
            return cls(failure=Verdict.of(failed(error)).error, cause=error)

    @property
    def done(self) -> T:
        """What the work returned, where it did not fail."""
        return cast("T", self.result)

    def short(self) -> bytes:
        """The message. A plan is as long as somebody wrote it down, so it goes as it is."""
        said = {"failure": self.failure} if self.failure is not None else {"facts": self.facts}
        return canonical(said).encode()


def collect(
    model: torch.nn.Module | Mapping[Any, torch.nn.Module] | None,
    *,
    device_type: str | None,
    rule: str,
    world: World,
    world_size: int | None,
    plan: RegionPlan | str | Path | None,
    mesh: Any = None,
    stage: Any = None,
) -> Statement:
    """Look at this rank. Whatever is wrong here already becomes the statement's ``failure``; nothing is raised.

    ``world_size`` is the size that the world is fixed to, or None.
    """
    try:
        world.require_size(world_size, "the coordinator")
        modules = _modules(model)
        own = RegionPlan({}) if model is None else own_plan(model, mesh, stage)
        device = device_type_of(modules, device_type, rule)
        if plan is not None:
            plan = plan if isinstance(plan, RegionPlan) else RegionPlan.from_json(plan)
            world.require_size(plan.world_size, "the plan")
            meet_plan(own, plan)
        facts = {
            "rule": rule,
            "world size": world.size,
            "device type": device,
            "device backend": "+".join(type(backend_for(kind)).__name__ for kind in device.split("+")),
            "collectives": collectives(),
            "torch": torch.__version__,
            "distckpt": distckpt.__version__,
        }
        names = tuple(sorted(stream.name for stream in streams.registered()))
        models = {stage: Signature.of(part) for stage, part in zip(own.stages, modules, strict=True)}
        place = None if mesh is None else Place.in_mesh(mesh)
        given = None if plan is None else plan.to_json()
        made = Statement(facts, names, own, given, models, place)
        made.short()
        return made
    except Exception as error:  # the other ranks wait for what this one says, whatever happened to it
        return Statement(failure=Verdict.of(failed(error)).error, cause=error)


def _modules(model: Any) -> list[torch.nn.Module]:
    if model is None:
        return []
    parts = list(model.values()) if isinstance(model, Mapping) else [model]
    for part in parts:
        if not isinstance(part, torch.nn.Module):
            shown = repr(part) if isinstance(part, (str, int)) else f"a {type(part).__name__}"
            raise BadOption(
                f"check looks at a module or at a mapping of stages to modules, not at {shown}",
                fix="coord.check(model), or coord.check({0: first, 4: second}) for several stages on one rank",
            )
    return parts


def own_plan(model: Any, mesh: Any, stage: Any) -> RegionPlan:
    """This rank's part of the plan: its stage is named by ``stage``, the mapping's keys, or the mesh."""
    if not isinstance(model, torch.nn.Module):
        if stage is not None or (mesh is not None and _stage_dimensions(mesh)):
            raise BadOption(
                "the stages are named by the mapping's keys and by stage= or mesh= as well",
                fix="leave stage= out, and a mesh with a pipeline dimension too",
            )
        for name in model:
            _check_stage(name)
        return RegionPlan.of(model)
    if stage is None and mesh is not None:
        stage = _stage_in(mesh)
    _check_stage(0 if stage is None else stage)
    return RegionPlan.of(model, stage=0 if stage is None else stage)


def _check_stage(stage: Any) -> None:
    # Stages are compared by what they are called; an object is called by its address, another one on each rank.
    if not isinstance(stage, str) and not hasattr(stage, "__index__"):
        raise BadOption(
            f"a stage is a number or a name, not a {type(stage).__name__}",
            fix="stage=stage.stage_index, or a mapping of stage indices to modules",
        )


def _stage_in(mesh: Any) -> str | None:
    names, at = dimensions(mesh), mesh.get_coordinate()
    if at is None:
        raise BadOption("this rank is not in the mesh", fix="check with a mesh that every rank is in")
    return "-".join(str(i) for name, i in zip(names, at, strict=True) if name in STAGE_DIMENSIONS) or None


def _stage_dimensions(mesh: Any) -> list[str]:
    return [name for name in dimensions(mesh) if name in STAGE_DIMENSIONS]


def device_type_of(modules: Iterable[torch.nn.Module], expected: str | None, rule: str) -> str:
    """The device type that this rank trains on: ``expected``, else that of the modules' tensors, else the machine's.

    CPU and meta tensors never count. Under ``"warn"`` and ``"all"`` several types are joined by ``+``.

    Raises:
        MixedRankDevices: the modules are on another type than expected, or on several, under the rule ``"error"``.
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    types = device_types(tensors)
    if expected is not None and expected not in types:
        types.insert(0, expected)
    if expected == "cpu" and len(types) == 1:
        return expected
    if len(types) > 1 and rule == "error":
        met = sorted({tensor.device.type for tensor in tensors} - {"cpu", "meta"})
        asked = f", and the coordinator is for {expected}" if expected else ""
        raise MixedRankDevices(
            f"the model of a rank is on {' and '.join(met)}{asked}",
            why="a region stashes the random state of the CPU and one other device type",
            fix='move the model to one type, or choose Coordinator(rule="all")',
        )
    return "+".join(types) if types else DefaultDeviceType.get_device_type()


def collectives() -> str:
    """The collective backends of the default group, as torch spells them; ``"none"`` without one."""
    if not dist.is_available() or not dist.is_initialized():
        return "none"
    return str(dist.get_backend_config())


def meet_plan(own: RegionPlan, plan: RegionPlan) -> None:
    """Refuse a model whose regions are not those that the plan has for its stages.

    Raises:
        StageMissing: the plan does not have one of the stages.
        PlanNotMet: a stage has other regions.
    """
    for stage, regions in own.stages.items():
        if stage not in plan.stages:
            raise StageMissing(
                f"the plan has nothing about stage {stage}",
                where=f"stages of the plan: {', '.join(plan.stages) or 'none'}",
                fix="make the plan from every stage: RegionPlan.of({0: first, 1: second, ...})",
            )
        names = differences(regions, plan.stages[stage])
        if names:
            lines = [
                f"{name or 'the model'}: {describe(regions.get(name))}, and in the plan "
                f"{describe(plan.stages[stage].get(name))}"
                for name in names
            ]
            raise PlanNotMet(
                f"stage {stage} has other regions than the plan",
                where=listed(lines),
                fix="apply the plan's regions to this model, or make the plan again",
            )


def listed(lines: list[str], most: int = 12) -> str:
    """Lines of a message, each under the last, cut after ``most``."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n         ".join([*lines[:most], *more])
