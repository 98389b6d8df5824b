"""RegionPlan: which modules of which pipeline stage are regions, and how, in a form that ranks can compare."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from distckpt import _torch
from distckpt.engine.region import Options
from distckpt.errors import BadPlan
from distckpt.modules.module_region import region_of

VERSION = 1
Regions = Mapping[str, Any]  # dotted name -> {"by": what made it a region, "options": {...}}

# Where a wrapper module of torch's keeps the module that it wraps.
WRAPPED = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})
_NAMED = (FunctionType, BuiltinFunctionType, MethodType, type)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


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
        return {"by": "distckpt", "options": {key: plain(value) for key, value in options.items()}}
    by = _torch.checkpointed_by(module)
    if by is None:
        return None
    function = getattr(module, "checkpoint_fn", None)
    return {"by": by, "options": {} if function is None else {"checkpoint_fn": plain(function)}}


def plain(value: Any) -> Any:
    """A value as JSON can carry it and ranks can compare it: callables and operators by name, never by address; devices
    and generators by device type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, functools.partial):
        return {"partial": plain(value.func), "args": plain(value.args), "kwargs": plain(value.keywords)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(canonical(plain(item)) for item in value)
    if isinstance(value, (torch.device, torch.Generator)):
        # Its type only: the ranks of a machine have different indices, and a generator has no name of its own.
        kind = value.type if isinstance(value, torch.device) else value.device.type
        return f"{type(value).__name__} on {kind}"
    if isinstance(value, _NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", str(value))


_DEFAULTS = {key: plain(value) for key, value in dataclasses.asdict(Options()).items()}


def describe(entry: Any) -> str:
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


def differences(a: Regions, b: Regions) -> list[str]:
    """Names of the modules about which two stages' plans differ, sorted."""
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
