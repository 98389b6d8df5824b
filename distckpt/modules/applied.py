"""Applied: the regions that ``dc.apply`` put on a model, and how to take them off."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any, Literal, NoReturn

import torch

from distckpt import _torch
from distckpt.engine.api import make_options
from distckpt.engine.misuse import unknown_option
from distckpt.engine.options import ContextFn, DeterminismCheck, Options, Partition
from distckpt.errors import AlreadyRegion, BadOption, NotAModel
from distckpt.modules.choice import Choice, choose
from distckpt.modules.forward import ModuleRegion, region_of
from distckpt.modules.libraries import libraries, plain


class Applied:
    """The regions on some modules of a model. Usable as a context manager.

    ``names`` are the modules' dotted names in the model, in ``named_modules()`` order.
    """

    def __init__(self, regions: Iterable[tuple[str, ModuleRegion]], model: torch.nn.Module) -> None:
        self._regions = tuple(regions)
        self._model = weakref.ref(model)  # a handle that is kept does not keep the model
        self.names = tuple(name for name, _ in self._regions)

    def remove(self) -> None:
        """Make the modules what they were before. Copies of the model keep their regions. Idempotent.

        A ``forward`` that someone else put over a region's since then stays in place, and calls through to the
        module without a region.
        """
        for _, region in reversed(self._regions):
            region.detach()
        model = self._model()
        if self._regions and model is not None:
            for library in libraries(model):
                library.settle(model)
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
    globs: Choice | None = None,
    *,
    use_reentrant: Literal[False] = False,
    preserve_rng_state: bool = True,
    context_fn: ContextFn | None = None,
    determinism_check: DeterminismCheck = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    partition: Partition | None = None,
    **unknown: NoReturn,  # any other keyword: an error for type checkers, and a sentence at run time
) -> Applied:
    """Make modules of ``model`` regions, in place: each call of one is then a ``dc.checkpoint`` of its forward.

    Class, dotted names, parameters, ``state_dict`` and hooks stay as they are; deep copies and pickles of the
    model carry their regions with them. The module's own hooks run outside the region, so once per step; hooks
    of modules below it run again in the replay. Works before and after ``fully_shard``, and under ``torch.compile``.

    Args:
        globs: one glob over the names of ``model.named_modules()``, or several. ``*`` stays within one dotted
            part, ``**`` crosses them; ``""`` is the model itself. A class, a function of a module or of its name and
            the module, and modules themselves (``model.layers``: each in the list) choose as well, and several of
            all these together. A module that contains another chosen one makes nested regions. Containers that
            are never called (``ModuleList``) are passed over. Left out: the layers of a transformers model, also
            inside a peft or Lightning module.
        use_reentrant: may say what holds anyway; a module is never a reentrant region.
        preserve_rng_state, context_fn, determinism_check, debug, early_stop, respect_saved_tensors_hooks, partition:
            as for ``dc.checkpoint``, the same for every chosen module.

    Returns:
        A handle whose ``remove()`` undoes this.

    Raises:
        NotAModel: the first argument is no module (DC305).
        BadChoice: the second is in no form that is known (DC306).
        NoMatch: a glob, class, function or module matches no module, or nothing was chosen (DC301). Nothing has been
            changed then, and after any error below.
        AlreadyRegion: a chosen module is a region already, by whatever way (DC302).
        NeverCalled: a glob matches only containers (DC303).
        UnknownModel: no glob, and no known library has layers in this model (DC601).
        OldFormat: no glob, and a transformers model that switches checkpointing the old way (DC602).
        BadOption: an unknown option, or an option with a value that it does not know (DC109).

    Example:
        >>> handle = dc.apply(model, "layers.*")
        >>> handle = dc.apply(model, ["encoder.layers.*", "decoder.**.mlp"], determinism_check="fingerprint")
        >>> handle = dc.apply(model, TransformerBlock)
    """
    if not isinstance(model, torch.nn.Module):
        raise _not_a_model(model, globs)
    if unknown:
        raise unknown_option("dc.apply", unknown, _OPTIONS)
    if use_reentrant is not False:
        raise BadOption(
            f"a module is never a reentrant region, and use_reentrant is {use_reentrant!r}",
            fix="leave it out; dc.checkpoint(module, x, use_reentrant=True) makes one call reentrant",
        )
    options: dict[str, Any] = {
        "preserve_rng_state": preserve_rng_state,
        "context_fn": context_fn,
        "determinism_check": determinism_check,
        "debug": debug,
        "early_stop": early_stop,
        "respect_saved_tensors_hooks": respect_saved_tensors_hooks,
        "partition": partition,
    }
    make_options(options)  # refuses what a call refuses
    chosen = choose(model, globs)
    for name, module in chosen:
        _refuse_region(module, name)
    known = libraries(model)
    for library in known:
        library.check(model)
    regions = [
        (name, ModuleRegion(module, Options(name=name or type(module).__name__, **options), plain(module)))
        for name, module in chosen
    ]
    for _, region in regions:
        region.attach()
    for library in known:
        library.settle(model)
    return Applied(regions, model)


_OPTIONS = {name for name, p in inspect.signature(apply).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _not_a_model(model: Any, globs: Any) -> NotAModel:
    swapped = isinstance(globs, torch.nn.Module)
    return NotAModel(
        f"dc.apply puts regions on the modules of a model, and was given a {type(model).__name__}",
        why="the model comes first" if swapped else None,
        fix='dc.apply(model, "layers.*"): an nn.Module, then which of its modules',
    )


def regions(model: torch.nn.Module) -> Applied:
    """The regions that are on ``model`` now: for a copy or a loaded pickle, which has no handle yet."""
    found = ((name, module, region_of(module)) for name, module in model.named_modules())
    mine = ((name, region) for name, module, region in found if region and region.module() is module)
    return Applied(mine, model)


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
