"""Unit: one or several modules that FSDP2 gathers together; which a call means, in what order, and what is wrong.

Everything here looks and complains. Nothing changes the model, because FSDP2 cannot be undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from distckpt._torch_dist import sharded_by
from distckpt.errors import (
    AlreadySharded,
    BadChoice,
    CannotShard,
    NeverCalled,
    NoMatch,
    SharedAcrossUnits,
    UnknownUnit,
)
from distckpt.modules import choose_modules
from distckpt.modules.apply import Choice, One, as_list, compile_glob

Units: TypeAlias = "One | Iterable[One | tuple[One, ...] | list[One]]"


@dataclass(eq=False)
class Unit:
    """Modules that are gathered together, mostly one; ``options`` are FSDP2's, for this unit."""

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[torch.nn.Parameter, str] = field(default_factory=dict)  # with their names

    @property
    def name(self) -> str:
        """The dotted names, joined with ``+``; empty for the root."""
        return "+".join(self.names)

    def __str__(self) -> str:
        return f"the unit {self.name!r}" if self.name else "the root unit"


def find(model: torch.nn.Module, asked: Units) -> list[Unit]:
    """The units that ``asked`` means, inner ones before those around them, and the model itself last.

    Raises:
        UnknownUnit: an entry matches nothing that can be a unit (DC420).
        BadChoice: an entry is in no form that is known (DC306).
        CannotShard: a module is in two units, or units overlap so that no order is right (DC425).
    """
    units: dict[torch.nn.Module, Unit] = {}
    for entry in as_list(asked):
        together = isinstance(entry, (tuple, list))
        found = [item for item in _choose(model, entry if together else [entry]) if item[1] is not model]
        if together:
            groups = [Unit(tuple(n for n, _ in found), tuple(m for _, m in found))] if found else []
        else:
            groups = [Unit((name,), (module,)) for name, module in found if module not in units]
        for unit in groups:
            for module in unit.modules:
                if units.setdefault(module, unit) is not unit:
                    raise CannotShard(
                        f"a module of {unit} is in {units[module]} as well",
                        fix="let one entry of units name it; an entry that is a tuple makes one unit",
                    )
    return _in_order(model, list(dict.fromkeys(units.values())))


def _choose(model: torch.nn.Module, choice: Choice) -> list[tuple[str, torch.nn.Module]]:
    try:
        return choose_modules(model, choice)
    except BadChoice as error:
        raise BadChoice(f"units: {error.what}", fix=error.fix) from None
    except NoMatch as error:
        raise UnknownUnit(f"units: {error.what}", why=error.why, fix=error.fix) from None
    except NeverCalled as error:
        why = "they have no forward, so FSDP2 would have no moment to gather them"
        raise UnknownUnit(f"units: {error.what}", why=why, fix=error.fix) from None


def _in_order(model: torch.nn.Module, units: list[Unit]) -> list[Unit]:
    place = {module: index for index, module in enumerate(_children_first(model))}
    units = sorted(units, key=lambda unit: max(place[module] for module in unit.modules))
    covered: dict[torch.nn.Module, Unit] = {}
    for unit in units:
        for module in unit.modules:
            if module in covered:
                raise CannotShard(
                    f"{unit} lies partly inside {covered[module]}",
                    why="FSDP2 makes units from the inside out, and here neither comes first",
                    fix="choose units of which each is either inside another one as a whole or outside",
                )
        covered |= {inner: unit for module in unit.modules for inner in module.modules()}
    return [*units, Unit(("",), (model,))]


def _children_first(model: torch.nn.Module) -> list[torch.nn.Module]:
    seen: dict[torch.nn.Module, None] = {}

    def visit(module: torch.nn.Module) -> None:
        for child in module.children():
            if child not in seen:
                visit(child)
        seen[module] = None

    visit(model)
    return list(seen)


def give_options(
    model: torch.nn.Module,
    units: list[Unit],
    options: Mapping[str, Any],
    overrides: Mapping[Any, Mapping[str, Any]],
) -> None:
    """Give each unit its options: the common ones, then those of every override whose glob or class names it.

    Raises:
        UnknownUnit: an override names no unit.
        BadChoice: it does so in no form that is known.
    """
    for unit in units:
        unit.options = dict(options)
    for key, extra in overrides.items():
        hits = _named(key, model, units)
        if not hits:
            names = ", ".join(repr(name) for unit in units for name in unit.names)
            what = f"the glob {key!r}" if isinstance(key, str) else f"{key!r}"
            raise UnknownUnit(f"overrides: {what} names no unit", why=f"the units are {names}")
        for unit in hits:
            unit.options |= extra


def _named(key: Any, model: torch.nn.Module, units: list[Unit]) -> list[Unit]:
    if isinstance(key, str):
        pattern = compile_glob(key)
        return [unit for unit in units if any(pattern.fullmatch(name) for name in unit.names)]
    chosen = {module for _, module in _choose(model, [key])}
    return [unit for unit in units if chosen.intersection(unit.modules)]


def refuse_sharded(model: torch.nn.Module, units: list[Unit]) -> None:
    """Raise for units that are distributed already, and for units inside a module that is.

    Modules inside a unit may be: experts on a mesh of their own, sharded before by hand.

    Raises:
        AlreadySharded: DC422.
    """
    chosen = {module: unit for unit in units for module in unit.modules}
    for name, module in model.named_modules():
        how = sharded_by(module)
        if how is None:
            continue
        inside = next((chosen[m] for m in module.modules() if m in chosen), None)
        if inside is not None:
            place = "the model" if module is model else f"module {name!r}"
            raise AlreadySharded(
                f"{place} is distributed already, by {how}",
                where=None if module in chosen else f"around {inside}",
                why="its parameters are divided over the ranks once, and cannot be again",
                fix="call coord.fully_shard on the plain model; modules inside a unit may be sharded before",
            )


def assign_parameters(model: torch.nn.Module, units: list[Unit]) -> None:
    """Find out which parameters each unit would own.

    Raises:
        SharedAcrossUnits: a parameter is used in two units (DC423).
    """
    chosen = {module: unit for unit in units for module in unit.modules}
    owner: dict[torch.nn.Parameter, tuple[Unit, str]] = {}
    done: set[tuple[torch.nn.Module, Unit]] = set()

    def visit(module: torch.nn.Module, unit: Unit, prefix: str) -> None:
        unit = chosen.get(module, unit)
        if (module, unit) in done or (module not in chosen and sharded_by(module)):
            return
        done.add((module, unit))
        ignored = unit.options.get("ignored_params") or ()
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in ignored:
                continue
            name = f"{prefix}{leaf}"
            first, first_name = owner.setdefault(parameter, (unit, name))
            if first is not unit:
                raise SharedAcrossUnits(
                    f"the parameter {first_name!r} of {first} is shared with {name!r} of {unit}",
                    why="FSDP2 would make two parameters of it",
                    fix="make one unit of both with a tuple, as in units=['layers.*', ('embed', 'head')], "
                    "or leave both to the root by naming neither",
                )
            unit.parameters.setdefault(parameter, name)
        for child_name, child in module.named_children():
            visit(child, unit, f"{prefix}{child_name}.")

    visit(model, units[-1], "")


class _Scratch(torch.nn.Module):
    def forward(self) -> None: ...


def rehearse(units: list[Unit]) -> None:
    """Let FSDP2 shard empty copies of every unit's parameters first, so that what it refuses changes nothing.

    The copies are on the ``meta`` device and take no memory. Parameters that are ``DTensor`` already, and a mesh
    with ``dp_mesh_dims``, are left to the real call.

    Raises:
        CannotShard: what FSDP2 said (DC425).
    """
    from torch.distributed.fsdp import fully_shard

    seen: set[int] = set()
    for unit in units:
        options = {key: value for key, value in unit.options.items() if key != "ignored_params"}
        reshard = options.get("reshard_after_forward")
        if type(reshard) is int and reshard in seen:
            options["reshard_after_forward"] = True  # each number makes process groups; once is enough
        elif type(reshard) is int:
            seen.add(reshard)
        scratch, real = _Scratch(), {}
        for parameter, name in unit.parameters.items():
            if type(parameter) is torch.nn.Parameter and not options.get("dp_mesh_dims"):
                copy = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
                )
                stand_in = torch.nn.Parameter(copy, requires_grad=parameter.requires_grad)
                scratch.register_parameter(name.replace(".", "/"), stand_in)
                real[stand_in] = parameter
        place = options.get("shard_placement_fn")
        if callable(place):
            options["shard_placement_fn"] = lambda p, place=place, real=real: place(real[p])
        policy = options.get("mp_policy")
        override = getattr(policy, "param_dtype_override_fn", None)  # torch 2.15 and later
        if policy is not None and callable(override):
            options["mp_policy"] = dataclasses.replace(
                policy, param_dtype_override_fn=lambda p, override=override, real=real: override(real[p])
            )
        try:
            fully_shard(scratch, **options)
        except Exception as error:
            said = str(error)
            for name in unit.parameters.values():
                said = said.replace(name.replace(".", "/"), name)
            raise CannotShard(
                f"FSDP2 does not take {unit} with these options",
                why=f"{type(error).__name__}: {said}",
                fix="see torch.distributed.fsdp.fully_shard; nothing has been changed",
            ) from error
