"""Statement: what one rank says about itself when the ranks agree. Short whatever the model's size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distckpt_backends import get as backend_for
from distckpt_backends.errors import DistckptError

import distckpt
from distckpt.engine import streams
from distckpt.engine.devices import DefaultDeviceType, device_types
from distckpt.engine.errors import BadOption
from distckpt.ranks.errors import MixedRankDevices, PlanNotMet, StageMissing
from distckpt.ranks.meeting import Verdict
from distckpt.ranks.regionplan import RegionPlan, canonical, describe, differences, digest
from distckpt.ranks.world import World

# Mesh dimensions along which the plans are free to differ: each coordinate is a pipeline stage.
STAGE_DIMENSIONS = ("pp", "pipe", "pipeline", "stage")


@dataclasses.dataclass(frozen=True)
class Statement:
    """The message (:meth:`short`), and what stands behind its hashes (:meth:`long`), sent on disagreement only.

    ``failure`` is what is wrong on this rank already, so that the others raise it too instead of waiting.
    """

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    streams: tuple[str, ...] = ()
    plan: RegionPlan = dataclasses.field(default_factory=lambda: RegionPlan({}))
    given: str | None = None
    failure: dict[str, Any] | None = None

    def short(self) -> bytes:
        """A few hundred bytes: facts, hashes, and one hash per stage that this rank has."""
        if self.failure is not None:
            return canonical({"failure": self.failure}).encode()
        said = {
            **self.facts,
            "streams": digest(canonical(self.streams)),
            "given": None if self.given is None else digest(self.given),
            "plan": {stage: digest(canonical(regions)) for stage, regions in self.plan.stages.items()},
        }
        return canonical(said).encode()

    def long(self) -> bytes:
        """Names of the streams, the given plan, and the regions of every stage of this rank."""
        given = None if self.given is None else json.loads(self.given)["stages"]
        return canonical({"streams": self.streams, "given": given, "plan": self.plan.stages}).encode()


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
        own = RegionPlan({}) if model is None else own_plan(model, mesh, stage)
        modules = _modules(model)
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
        return Statement(facts, names, own, None if plan is None else plan.to_json())
    except DistckptError as error:
        return Statement(failure=Verdict.of(error).error)


def _modules(model: Any) -> list[torch.nn.Module]:
    if model is None:
        return []
    return [model] if isinstance(model, torch.nn.Module) else list(model.values())


def own_plan(model: Any, mesh: Any, stage: Any) -> RegionPlan:
    """This rank's part of the plan: its stage is named by ``stage``, the mapping's keys, or the mesh."""
    if not isinstance(model, torch.nn.Module):
        if stage is not None or (mesh is not None and _stage_dimensions(mesh)):
            raise BadOption(
                "the stages are named by the mapping's keys and by stage= or mesh= as well",
                fix="leave stage= out, and a mesh with a pipeline dimension too",
            )
        return RegionPlan.of(model)
    if stage is None and mesh is not None:
        stage = "-".join(str(mesh.get_local_rank(name)) for name in _stage_dimensions(mesh)) or None
    return RegionPlan.of(model, stage=0 if stage is None else stage)


def _stage_dimensions(mesh: Any) -> list[str]:
    names = mesh.mesh_dim_names
    if not names:
        raise BadOption(
            "a mesh without dimension names does not say which ranks are stages",
            fix='init_device_mesh(..., mesh_dim_names=("pp", "dp")), or pass stage=',
        )
    return [name for name in names if name in STAGE_DIMENSIONS]


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
