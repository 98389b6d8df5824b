"""Plan: which modules of which stage are regions, and what the model is made of, in a form that ranks can compare.

Note [Which ranks are compared]
    Ranks of one stage train one model, so names, classes, dtypes, what is frozen, training or eval, and dropout are
    equal on all of them; a DTensor has its global shape on all of them too. The shape of a plain tensor may differ
    where somebody divides parameters by hand: along tensor and expert parallel dimensions. It is equal along those
    that copy or shard whole parameters: data parallel, FSDP, HSDP, context parallel. Experts may be other modules on
    other ranks, so ranks at different places of an expert dimension are not compared in anything but DTensors' shapes.
    Parameters below an FSDP1 wrapper have no shape here: each rank holds a piece of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from distckpt import _torch, _torch_dist
from distckpt.engine.region import Options
from distckpt.errors import BadOption, BadPlan, PlanNotMet, StageMissing
from distckpt.modules.module_region import region_of
from distckpt.ranks.rng_streams import ALIASES

VERSION = 1
Regions = Mapping[str, Any]  # dotted name -> {"by": what made it a region, "options": {...}}

# Where a wrapper module of torch's keeps the module that it wraps.
WRAPPED = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})
_NAMED = (FunctionType, BuiltinFunctionType, MethodType, type)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


Facts = list[tuple[str, Any]]  # ("layers.0.weight: dtype", "float32"), in the model's order

_EXPERT = "ep"
_WHOLE = (
    "dp",
    "cp",
    "pp",
)  # meanings of mesh dimensions along which a rank has a parameter whole, or an FSDP shard


def digest(text: str) -> str:
    """A short hash of a canonical text (128 bits, in hex)."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """The regions of a model, by pipeline stage.

    Regions of ``dc.apply``, of the composable and wrapper forms, and of torch's own wrappers are seen, with their
    options. Calls of ``dc.checkpoint`` inside a forward are not: they exist only while it runs.

    Args:
        stages: stage name to its regions. A model without pipeline stages is one stage named ``"0"``.
        world_size: the number of ranks that this plan is for, or None for any.
    """

    stages: Mapping[str, Regions]
    world_size: int | None = None

    @classmethod
    def of(
        cls,
        model: torch.nn.Module | Mapping[Any, torch.nn.Module],
        *,
        stage: Any = 0,
        world_size: int | None = None,
    ) -> RegionPlan:
        """The plan that a model, or a mapping of stages to their modules, follows now."""
        parts = {stage: model} if isinstance(model, torch.nn.Module) else model
        return cls({str(name): regions_of(part) for name, part in parts.items()}, world_size)

    def to_json(self) -> str:
        """Canonical JSON: equal plans give equal text."""
        return canonical({"version": VERSION, "world_size": self.world_size, "stages": self.stages})

    @classmethod
    def from_json(cls, text: str | Path) -> RegionPlan:
        """Read :meth:`to_json`'s text, or a file of it.

        Raises:
            BadPlan: it is not one.
        """
        try:
            said = json.loads(text.read_text() if isinstance(text, Path) else text)
            if said["version"] != VERSION:
                raise BadPlan(
                    f"a region plan of format version {said['version']}, not {VERSION}", fix="make it again"
                )
            stages = {str(stage): dict(regions) for stage, regions in said["stages"].items()}
            return cls(stages, said["world_size"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, BadPlan):
                raise
            raise BadPlan(
                "this is no region plan", where=str(text)[:80], why=repr(error), fix="write it with to_json()"
            ) from error

    @property
    def hash(self) -> str:
        """A hash of the canonical JSON."""
        return digest(self.to_json())


def regions_of(model: torch.nn.Module) -> dict[str, Any]:
    """The regions on ``model`` by dotted name, without the names that wrappers put in between."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        entry = _entry(module)
        if entry is not None:
            found[without_wrappers(name)] = entry
    return found


def without_wrappers(name: str) -> str:
    """A module's dotted name as it is without the wrappers around it and its parents."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _entry(module: torch.nn.Module) -> dict[str, Any] | None:
    region = region_of(module)
    if region is not None and region.module() is module and region.options is not None:
        options = dataclasses.asdict(region.options)
        del options["name"]  # the module's name again
        return {"by": "distckpt", "options": {key: comparable(value) for key, value in options.items()}}
    by = _torch.checkpointed_by(module)
    if by is None:
        return None
    function = getattr(module, "checkpoint_fn", None)
    return {"by": by, "options": {} if function is None else {"checkpoint_fn": comparable(function)}}


def comparable(value: Any) -> Any:
    """A value as JSON can carry it and ranks can compare it: callables and operators by name, never by address; devices
    and generators by device type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, functools.partial):
        return {
            "partial": comparable(value.func),
            "args": comparable(value.args),
            "kwargs": comparable(value.keywords),
        }
    if isinstance(value, Mapping):
        return {str(key): comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(canonical(comparable(item)) for item in value)
    if isinstance(value, (torch.device, torch.Generator)):
        # Its type only: the ranks of a machine have different indices, and a generator has no name of its own.
        kind = value.type if isinstance(value, torch.device) else value.device.type
        return f"{type(value).__name__} on {kind}"
    if isinstance(value, _NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", str(value))


_DEFAULTS = {key: comparable(value) for key, value in dataclasses.asdict(Options()).items()}


def describe_region(entry: Any) -> str:
    """One region for people: what made it, and the options that are not the default."""
    if entry is None:
        return "no region"
    options = entry.get("options", {})
    shown = ", ".join(
        f"{key}={value if isinstance(value, str) else canonical(value)}"
        for key, value in sorted(options.items())
        if key not in _DEFAULTS or value != _DEFAULTS[key]
    )
    return f"a region by {entry.get('by')}" + (f" with {shown}" if shown else "")


def differing_regions(a: Regions, b: Regions) -> list[str]:
    """Names of the modules about which two stages' plans differ, sorted."""
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


@dataclasses.dataclass(frozen=True)
class MeshPlace:
    """Where a rank stands in its mesh, for what is compared: ranks with equal text are."""

    structure: str = ""
    shapes: str = ""

    @classmethod
    def in_mesh(cls, mesh: Any) -> MeshPlace:
        """The place of this rank; without a mesh all ranks stand at one."""
        if mesh is None:
            return cls()
        names, at = dimensions(mesh), mesh.get_coordinate()
        if at is None:
            raise BadOption("this rank is not in the mesh", fix="check with a mesh that every rank is in")
        found = [(name, ALIASES.get(name, name), int(i)) for name, i in zip(names, at, strict=True)]
        return cls(
            ",".join(f"{name}={i}" for name, meaning, i in found if meaning == _EXPERT),
            ",".join(f"{name}={i}" for name, meaning, i in found if meaning not in _WHOLE),
        )


def dimensions(mesh: Any) -> tuple[str, ...]:
    """The names of a mesh's dimensions.

    Raises:
        BadOption: it has none, or is no mesh.
    """
    if not callable(getattr(mesh, "get_coordinate", None)):
        raise BadOption(
            f"mesh is a DeviceMesh whose dimensions have names, not {mesh!r}",
            fix='init_device_mesh(..., mesh_dim_names=("pp", "dp"))',
        )
    if not mesh.mesh_dim_names:
        raise BadOption(
            "a mesh without dimension names does not say which ranks are stages",
            fix='init_device_mesh(..., mesh_dim_names=("pp", "dp")), or pass stage=',
        )
    return tuple(mesh.mesh_dim_names)


@dataclasses.dataclass(frozen=True)
class Signature:
    """Of one stage: facts that are equal over its ranks, and local shapes, which are within a data-parallel group."""

    structure: Facts
    shapes: Facts

    @classmethod
    def of(cls, model: torch.nn.Module) -> Signature:
        """The signature of a model as it is now. It reads attributes only, so a model on meta does as well."""
        structure: Facts = []
        shapes: Facts = []
        pieces: list[
            str
        ] = []  # names of FSDP1 wrappers; what is below them is sharded over the data-parallel ranks
        modules = dict(model.named_modules())
        for full, module in modules.items():
            name = without_wrappers(full)
            if _torch_dist.is_fsdp1(module):
                pieces.append(full)
            in_pieces = any(full == at or at == "" or full.startswith(f"{at}.") for at in pieces)
            if not _only_wraps(full, modules):
                kind = type(module)
                structure.append((f"{name or 'the model'}: class", f"{kind.__module__}.{kind.__qualname__}"))
                structure.append((f"{name or 'the model'}: training", module.training))
                structure.extend((f"{name or 'the model'}: {key}", value) for key, value in _dropout(module))
            for own, parameter in module.named_parameters(recurse=False):
                at = f"{name}.{own}" if name else own
                structure.append((f"{at}: dtype", str(parameter.dtype).removeprefix("torch.")))
                structure.append((f"{at}: requires_grad", parameter.requires_grad))
                if in_pieces or is_lazy(parameter):
                    continue
                divided = _torch_dist.is_dtensor(parameter)
                shape = list(parameter.shape)  # of a DTensor the global one
                (structure if divided else shapes).append((f"{at}: shape", shape))
        return cls(structure, shapes)

    def hashes(self) -> list[str]:
        """Two short hashes, 64 bytes together."""
        return [digest(canonical(self.structure)), digest(canonical(self.shapes))]


def _only_wraps(full: str, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the module called ``full`` is a wrapper whose name is left out, so that what it wraps has its name."""
    prefix = f"{full}." if full else ""
    return any(f"{prefix}{wrapper}" in modules for wrapper in WRAPPED)


def _dropout(module: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for key, value in vars(module).items():
        named = (
            "dropout" in key or key == "drop_prob" or (key == "p" and "drop" in type(module).__name__.lower())
        )
        if named and type(value) in (int, float):
            yield key, value


def differing_facts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of the facts about which two signatures differ, in the order of the first."""
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


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
        names = differing_regions(regions, plan.stages[stage])
        if names:
            lines = [
                f"{name or 'the model'}: {describe_region(regions.get(name))}, and in the plan "
                f"{describe_region(plan.stages[stage].get(name))}"
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
