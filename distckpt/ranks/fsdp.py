"""fsdp: regions inside FSDP2 units, in the order that costs no all-gather; and what makes a unit know a replay.

Note [Units in a replay]
    A region that has units inside it calls them again in its replay. FSDP2 tells a unit that "this is backward" when
    the gradient reaches the unit's output, which is after the replay has called it. Until then the call looks like a
    forward: it prefetches what ``set_modules_to_forward_prefetch`` named, which in backward order has been used already
    and would be gathered for nothing. (Megatron-FSDP had the same mistake, and left such units gathered: Megatron-LM
    #6153.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from distckpt._torch import checkpointed_by, graph_task_id, opaque_to_dynamo
from distckpt._torch_dist import (
    UNITS_IN_REPLAYS,
    fsdp1_unit,
    fsdp1_unit_enters_replay,
    fsdp_state,
    fully_shard_options,
    unit_enters_replay,
)
from distckpt.engine import is_recomputing
from distckpt.errors import (
    BadChoice,
    BadOption,
    CannotShard,
    GatherOutsideBackward,
    NoMatch,
    NotAModel,
    UnitsInsideRegion,
    UnknownOption,
)
from distckpt.modules import Applied, apply, choose
from distckpt.modules import regions as regions_on
from distckpt.modules.apply import Choice
from distckpt.ranks import fsdp_units


class UnitGuard:
    """A forward pre-hook on one unit, ahead of FSDP2's own. Outside a replay it is one function call.

    ``enter`` tells the unit that a replay is about to call it, within a backward.
    """

    __slots__ = ("enter", "name")

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        self.name = name
        self.enter = enter

    @opaque_to_dynamo
    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not is_recomputing():
            return
        if graph_task_id() == -1:
            raise GatherOutsideBackward(
                f"a replay outside a backward called the FSDP unit {self.name!r}",
                why="the unit would be gathered as in a forward, and backward would not know its order any more",
                fix="let the backward replay this region, or make the unit the region",
            )
        self.enter()


def guard_units(model: torch.nn.Module) -> tuple[RemovableHandle, ...]:
    """Guard every FSDP2 and FSDP1 unit of ``model``; returns the hooks' handles, each with ``remove()``.

    ``coord.fully_shard`` does this by itself. Call it once for a model that was sharded by hand and has regions with
    units inside them. Before torch 2.13 FSDP2 units cannot be helped and are left alone.

    Raises:
        NotAModel: it is no module (DC305).
    """
    if not isinstance(model, torch.nn.Module):
        raise NotAModel(
            f"dc.guard_units guards the units of a model, and was given a {type(model).__name__}",
            fix="dc.guard_units(model)",
        )
    found = ((name, module, _entrance(module)) for name, module in model.named_modules())
    return tuple(
        module.register_forward_pre_hook(UnitGuard(name, enter), prepend=True)
        for name, module, enter in found
        if enter is not None and not any(isinstance(h, UnitGuard) for h in module._forward_pre_hooks.values())
    )


def _entrance(module: torch.nn.Module) -> Callable[[], None] | None:
    if fsdp1_unit(module):
        return partial(fsdp1_unit_enters_replay, module)
    state = fsdp_state(module)
    return partial(unit_enters_replay, state) if state is not None and UNITS_IN_REPLAYS else None


class _AsUnits:
    def __repr__(self) -> str:
        return "AS_UNITS"


AS_UNITS: Any = _AsUnits()

_REGION_OPTIONS = tuple(
    name for name, p in inspect.signature(apply).parameters.items() if p.kind is p.KEYWORD_ONLY
)


class Sharded:
    """What ``coord.fully_shard`` did.

    ``units`` are the units' dotted names in the order they were made: inner ones first, the root last. A unit
    of several modules is ``"norm+head"``. ``regions`` are the regions that this call put on. ``nested`` maps a region
    that has units inside it to their names: its replay gathers all of them, in forward order, and each stays
    gathered until its own backward. ``options`` maps each unit to the FSDP2 options that it got.
    """

    def __init__(
        self,
        applied: Applied,
        units: Mapping[str, Mapping[str, Any]],
        nested: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._applied = applied
        self.units = tuple(units)
        self.options = dict(units)
        self.regions = applied.names
        self.nested = dict(nested)

    def remove(self) -> None:
        """Take the regions off. The model stays sharded: FSDP2 has no way back. Idempotent."""
        self._applied.remove()
        self.regions, self.nested = (), {}

    def __enter__(self) -> Sharded:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        regions = ", ".join(self.regions) or "none"
        around = "".join(f"; {name} has {len(inside)} units inside" for name, inside in self.nested.items())
        units = ", ".join(name or "the root" for name in self.units)
        return f"Sharded(units: {units}; regions: {regions}{around})"


def fully_shard(
    coord: Any,
    model: torch.nn.Module,
    units: fsdp_units.Units,
    *,
    regions: Choice | None = AS_UNITS,
    overrides: Mapping[Any, Mapping[str, Any]] | None = None,
    policy: Any = None,
    plan: Any = None,
    **options: Any,
) -> Sharded:
    """Shard ``model`` with FSDP2, one unit per module that ``units`` names and one for the rest, with regions inside.

    A region sits inside its unit's hooks: the unit is gathered before the record, and gathered by FSDP2's own
    pre-backward when the replay comes. So there is not one all-gather more than without regions, and gradients are
    equal to the bit.

    Args:
        units: a glob over the names of ``model.named_modules()``, a class, a function of a module, modules, or
            several of these, as for ``dc.apply``. An entry that is itself a tuple or a list makes one unit of all that
            it matches (``("norm", "head")``). The model is always the last.
        regions: the modules to make regions, as for ``dc.apply``: finer than units, the same, or around several;
            None for no regions. Left out: the units' modules, but not the root.
        overrides: FSDP2 options for some units only: ``{"layers.11": {"reshard_after_forward": False}}``; ``""`` is
            the root, and a class or a module is a key as well. Later entries win.
        policy, plan: reserved; only None.
        options: every option of the installed torch's ``fully_shard`` (``mesh``, ``reshard_after_forward``,
            ``mp_policy``, ``offload_policy``, ...), and those of ``dc.apply`` for the regions. Without ``mesh`` all
            ranks are one dimension, on the coordinator's device type.

    Returns:
        A handle that says what was done; its ``remove()`` takes the regions off.

    Raises:
        NotAModel: the first argument is no module (DC305).
        BadChoice: ``units``, ``regions`` or a key of ``overrides`` is in no form that is known (DC306).
        UnknownUnit: a part of ``units`` or ``overrides`` matches nothing that can be a unit (DC420).
        UnknownOption: a keyword that nobody takes (DC421).
        AlreadySharded: a unit, or a module around it, is distributed already (DC422).
        SharedAcrossUnits: one parameter in two units (DC423).
        UnitsInsideRegion: before torch 2.13, a region around units (DC424).
        CannotShard: what FSDP2 itself refuses (DC425).
        NoMatch, AlreadyRegion, NeverCalled, BadOption: as ``dc.apply`` does, for ``regions`` and its options; also for
            ``policy`` and ``plan``. After any of these the model is as it was.

    Example:
        >>> coord = dc.Coordinator()
        >>> coord.fully_shard(model, units="layers.*", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    """
    _refuse_reserved(policy=policy, plan=plan)
    if not isinstance(model, torch.nn.Module):
        raise _not_a_model(model, units)
    overrides = _table(overrides)
    for_units, for_regions = _split(options, overrides)
    made = fsdp_units.find(model, units)
    if for_units.get("mesh") is None:
        for_units["mesh"] = _whole_mesh(coord)
    fsdp_units.give_options(model, made, for_units, overrides)
    fsdp_units.refuse_sharded(model, made)
    fsdp_units.assign_parameters(model, made)
    chosen = _chosen(model, made, regions)
    nested = _units_inside(model, made, chosen)
    fsdp_units.rehearse(made)
    applied = apply(model, chosen.values(), **for_regions) if chosen else Applied((), model)
    _shard(made, applied)
    guard_units(model)
    return Sharded(applied, {unit.name: unit.options for unit in made}, nested)


def _refuse_reserved(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise BadOption(
                f"{name}= needs data policies, which this version does not have",
                fix="choose the modules with regions=, and operators with context_fn=",
            )


def _not_a_model(model: Any, units: Any) -> NotAModel:
    return NotAModel(
        f"coord.fully_shard shards a model, and was given a {type(model).__name__}",
        why="the model comes first" if isinstance(units, torch.nn.Module) else None,
        fix='coord.fully_shard(model, "layers.*"): an nn.Module, then which of its modules are units',
    )


def _table(overrides: Any) -> Mapping[Any, dict[str, Any]]:
    """``overrides`` with plain values, or an error that says how they are written."""
    table = {} if overrides is None else overrides
    if not isinstance(table, Mapping) or not all(isinstance(extra, Mapping) for extra in table.values()):
        raise BadOption(
            "overrides= is a table of units, each with a table of options",
            fix='overrides={"layers.11": {"reshard_after_forward": False}}',
        )
    return {key: dict(extra) for key, extra in table.items()}


def _split(
    options: dict[str, Any], overrides: Mapping[Any, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    known = fully_shard_options()
    for where, given, allowed in (
        (None, options, (*known, *_REGION_OPTIONS)),
        *((f"overrides[{key!r}]", extra, known) for key, extra in overrides.items()),
    ):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            near = [m for name in unknown for m in get_close_matches(name, allowed, n=1)]
            meant = f"did you mean {', '.join(near)}? otherwise " if near else ""
            raise UnknownOption(
                f"coord.fully_shard has no option {', '.join(unknown)}",
                where=where,
                why=f"torch {torch.__version__} shards with {', '.join(known)}"
                + ("" if where else f"; regions take {', '.join(_REGION_OPTIONS)}"),
                fix=f"{meant}leave it out, or use a name that is listed",
            )
        _check_values(given)
    for_units = {name: value for name, value in options.items() if name in known}
    return for_units, {name: value for name, value in options.items() if name not in known}


def _check_values(options: dict[str, Any]) -> None:
    """Refuse what FSDP2 would take and ignore, or fail on in the first step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

    kinds = (("mp_policy", MixedPrecisionPolicy, ()), ("offload_policy", OffloadPolicy, (type(None),)))
    for name, kind, optional in kinds:
        if name in options and not isinstance(options[name], (kind, *optional)):
            raise BadOption(
                f"{name} is a {kind.__name__}, not {options[name]!r}",
                fix="mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), offload_policy=CPUOffloadPolicy(), "
                "both from torch.distributed.fsdp",
            )
    ignored = options.get("ignored_params")
    if ignored is not None:
        parameters = [*ignored] if isinstance(ignored, Iterable) else [ignored]
        if not all(isinstance(parameter, torch.nn.Parameter) for parameter in parameters):
            raise BadOption(
                "ignored_params are parameters", fix="ignored_params=set(model.head.parameters())"
            )
        options["ignored_params"] = set(parameters)


def _whole_mesh(coord: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise CannotShard(
            "there is no process group to shard over",
            why="torch.distributed is not initialised, and no mesh= was given",
            fix="call torch.distributed.init_process_group first; one process is a world of one",
        )
    kind = coord.device_type
    if kind is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = "cpu" if accelerator is None else accelerator.type
    return dist.init_device_mesh(kind, (dist.get_world_size(),))


def _chosen(model: torch.nn.Module, units: list[fsdp_units.Unit], regions: Any) -> dict[str, torch.nn.Module]:
    """The modules to make regions, by name."""
    if regions is AS_UNITS:
        regions = [module for unit in units[:-1] for module in unit.modules]
        return dict(choose(model, regions)) if regions else {}
    if regions is None:
        return {}
    try:
        return dict(choose(model, regions))
    except (NoMatch, BadChoice) as error:
        fix = f"{error.fix}; regions=None makes none" if error.fix else "regions=None makes none"
        raise type(error)(f"regions: {error.what}", why=error.why, fix=fix) from None


def _units_inside(
    model: torch.nn.Module, units: list[fsdp_units.Unit], chosen: Mapping[str, torch.nn.Module]
) -> dict[str, tuple[str, ...]]:
    """The regions, old and new and whoever's, that have units below them."""
    names = {module: unit.name for unit in units for module in unit.modules}
    for name, module in model.named_modules():
        if fsdp_state(module) is not None:
            names.setdefault(module, name)
    around = dict(chosen)
    around |= {name: model.get_submodule(name) for name in regions_on(model).names}
    around |= {name: module for name, module in model.named_modules() if checkpointed_by(module)}
    found: dict[str, tuple[str, ...]] = {}
    for name, module in around.items():
        inside = dict.fromkeys(names[m] for m in module.modules() if m in names and m is not module)
        if inside:
            found[name] = tuple(inside)
    if found and not UNITS_IN_REPLAYS:
        name, inside = next(iter(found.items()))
        raise UnitsInsideRegion(
            f"the region {name!r} has FSDP2 units inside it: {', '.join(inside)}",
            why=f"FSDP2 of torch {torch.__version__} gathers them once more in a replay, whoever replays",
            fix="use torch 2.13 or later, or make the units (or modules inside them) the regions",
        )
    return found


def _shard(units: list[fsdp_units.Unit], applied: Applied) -> None:
    from torch.distributed.fsdp import fully_shard

    for index, unit in enumerate(units):
        target: Any = unit.modules[0] if len(unit.modules) == 1 else list(unit.modules)
        try:
            fully_shard(target, **unit.options)
        except Exception as error:
            applied.remove()
            made = ", ".join(map(str, units[:index])) or "none"
            raise CannotShard(
                f"FSDP2 failed at {unit}, which its rehearsal had passed",
                why=f"{type(error).__name__}: {error}",
                fix=f"build the model again: FSDP2 cannot be undone, and had made {made}",
            ) from error
