"""Signature: what a model is made of, as ranks compare it: module by module and parameter by parameter.

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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from distckpt import _torch_dist
from distckpt.errors import BadOption
from distckpt.ranks.regionplan import WRAPPED, canonical, digest, without_wrappers
from distckpt.ranks.streams import ALIASES

Facts = list[tuple[str, Any]]  # ("layers.0.weight: dtype", "float32"), in the model's order

_EXPERT = "ep"
_WHOLE = (
    "dp",
    "cp",
    "pp",
)  # meanings of mesh dimensions along which a rank has a parameter whole, or an FSDP shard


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands in its mesh, for what is compared: ranks with equal text are."""

    structure: str = ""
    shapes: str = ""

    @classmethod
    def in_mesh(cls, mesh: Any) -> Place:
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


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of the facts about which two signatures differ, in the order of the first."""
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
