"""Applied: the regions that ``dc.apply`` put on a model, and how to take them off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distckpt import _torch
from distckpt.engine.options import ContextFn, Options, Partition
from distckpt.modules.errors import AlreadyRegion, NeverCalled
from distckpt.modules.forward import ModuleRegion, region_of
from distckpt.modules.globs import select


class Applied:
    """The regions on some modules of a model. Usable as a context manager.

    ``names`` are the modules' dotted names in the model, in ``named_modules()`` order.
    """

    def __init__(self, regions: Iterable[tuple[str, ModuleRegion]]) -> None:
        self._regions = tuple(regions)
        self.names = tuple(name for name, _ in self._regions)

    def remove(self) -> None:
        """Make the modules what they were before. Copies of the model keep their regions. Idempotent.

        A ``forward`` that someone else put over a region's since then stays in place, and calls through to the
        module without a region.
        """
        for _, region in reversed(self._regions):
            region.detach()
        self._regions = ()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __len__(self) -> int:
        return len(self._regions)

    def __repr__(self) -> str:
        return f"Applied({', '.join(self.names) if self._regions else 'removed'})"


def apply(
    model: torch.nn.Module,
    globs: str | Iterable[str],
    *,
    preserve_rng_state: bool = True,
    context_fn: ContextFn | None = None,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    partition: Partition | None = None,
) -> Applied:
    """Make modules of ``model`` regions, in place: each call of one is then a ``dc.checkpoint`` of its forward.

    Class, dotted names, parameters, ``state_dict`` and hooks stay as they are; deep copies and pickles of the
    model carry their regions with them. The module's own hooks run outside the region, so once per step; hooks
    of modules below it run again in the replay. Works before and after ``fully_shard``, and under ``torch.compile``.

    Args:
        globs: one glob over the names of ``model.named_modules()``, or several. ``*`` stays within one dotted
            part, ``**`` crosses them; ``""`` is the model itself. A module that contains another chosen one makes
            nested regions. Containers that are never called (``ModuleList``) are passed over.
        preserve_rng_state, context_fn, determinism_check, debug, early_stop, respect_saved_tensors_hooks, partition:
            as for ``dc.checkpoint``, the same for every chosen module.

    Returns:
        A handle whose ``remove()`` undoes this.

    Raises:
        NoMatch: a glob matches no module (DC301). Nothing has been changed; so too for the next two.
        AlreadyRegion: a chosen module is a region already, by whatever way (DC302).
        NeverCalled: a glob matches only containers (DC303).
        BadOption: an option has a value that it does not know (DC109).

    Example:
        >>> handle = dc.apply(model, "layers.*")
        >>> handle = dc.apply(model, ["encoder.layers.*", "decoder.**.mlp"], determinism_check="fingerprint")
    """
    options: dict[str, Any] = {
        "preserve_rng_state": preserve_rng_state,
        "context_fn": context_fn,
        "determinism_check": determinism_check,
        "debug": debug,
        "early_stop": early_stop,
        "respect_saved_tensors_hooks": respect_saved_tensors_hooks,
        "partition": partition,
    }
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    # With its duplicates: a shared module may be named by any of its names, and is made a region once.
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[torch.nn.Module, str] = {}
    for glob in globs:
        called = {name: modules[name] for name in select([glob], modules) if _has_forward(modules[name])}
        if not called:
            raise _never_called(glob, modules, select([glob], modules))
        for name, module in called.items():
            chosen.setdefault(module, name)
    for module, name in chosen.items():
        _refuse_region(module, name)
    order = {name: place for place, name in enumerate(modules)}
    regions = [
        (name, ModuleRegion(module, Options(name=name or type(module).__name__, **options)))
        for module, name in sorted(chosen.items(), key=lambda item: order[item[1]])
    ]
    for _, region in regions:
        region.attach()
    return Applied(regions)


def regions(model: torch.nn.Module) -> Applied:
    """The regions that are on ``model`` now: for a copy or a loaded pickle, which has no handle yet."""
    found = ((name, module, region_of(module)) for name, module in model.named_modules())
    return Applied((name, region) for name, module, region in found if region and region.module() is module)


def _has_forward(module: torch.nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not torch.nn.Module.forward


def _never_called(glob: str, modules: dict[str, torch.nn.Module], names: list[str]) -> NeverCalled:
    kinds = ", ".join(sorted({f"{name or 'the model'} ({type(modules[name]).__name__})" for name in names}))
    return NeverCalled(
        f"the glob {glob!r} matches only modules that are never called: {kinds}",
        why="they have no forward, so nothing would be recomputed",
        fix=f"name the modules inside, for example {glob + '.*'!r}",
    )


def _refuse_region(module: torch.nn.Module, name: str) -> None:
    region = region_of(module)
    if region is not None and region.module() is module:
        how = "dc.apply or composable_checkpoint"
        fix = "take the first region off: remove() on the handle, or on distckpt.modules.regions(model)"
    else:
        inside = name.rpartition(".")[2] == "_checkpoint_wrapped_module"
        how = "checkpoint_wrapper" if inside else _torch.checkpointed_by(module)
        fix = "choose one of the two"
    if how is not None:
        why = "each of its calls would be recomputed twice"
        raise AlreadyRegion(f"module {name!r} is a region already, by {how}", why=why, fix=fix)
