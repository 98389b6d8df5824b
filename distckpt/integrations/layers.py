"""Layers: what ``dc.apply`` needs to know about transformers models. See :mod:`distckpt.modules.apply`.

Regions go where ``dc.apply`` always puts them. transformers' own switch is set as well, with a function that only
calls: the model then leaves its key-value cache out of the layers, which a replay would fill twice, and what asks the
model whether it is checkpointed (the Trainer, peft) hears the truth.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache, PreTrainedModel

from distckpt.engine import pin
from distckpt.errors import AlreadyRegion, BothSwitches, OldFormat
from distckpt.modules.module_region import region_of

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # before 4.53 the model, and not the layer, asks the switch
    GradientCheckpointingLayer = type("GradientCheckpointingLayer", (torch.nn.Module,), {})  # type: ignore


_ROUTER = re.compile(r"(Router|Gating|Gate)$")


def layers(model: torch.nn.Module) -> list[str]:
    """The outermost checkpointable layers, or the modules that may not be split over devices where there are none.

    Raises:
        OldFormat: a model that overrides ``_set_gradient_checkpointing(module, value)``.
    """
    classes: set[str] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _refuse_old_format(module)
            classes.update(getattr(module, "_no_split_modules", None) or ())
    return _outermost(model, lambda m: isinstance(m, GradientCheckpointingLayer)) or _outermost(
        model, lambda m: type(m).__name__ in classes
    )


def check(model: torch.nn.Module) -> None:
    """Refuse a model whose own checkpointing is on.

    Raises:
        AlreadyRegion: ``activation_checkpointing_enable`` or ``_set_gradient_checkpointing`` was called before.
    """
    theirs = _theirs(model)
    for name, module in model.named_modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        on = function is not None and getattr(module, "gradient_checkpointing", False)
        if on and function is not call and module in theirs:
            raise AlreadyRegion(
                f"module {name!r} is a region already, by transformers' activation checkpointing",
                why="each of its calls would be recomputed twice",
                fix="call model.activation_checkpointing_disable() first, or leave dc.apply out",
            )


def settle(model: torch.nn.Module) -> None:
    """Set transformers' switch, its guard and the routers' pins where regions are, and take them off where none are."""
    regions = {module for module in model.modules() if _is_region(module)}
    inside = {module for region in regions for module in region.modules()}
    for module in _theirs(model):
        around = not regions.isdisjoint(module.modules())
        if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in module.__dict__:
            _switch(module, around)
        if isinstance(module, PreTrainedModel):
            _guard(module, around)
        if _ROUTER.search(type(module).__name__):
            _pin_outputs(module, module in inside)


def _theirs(model: torch.nn.Module) -> set[torch.nn.Module]:
    """What transformers' own switch would reach, so not the modules of another library beside its model."""
    tops = (m for m in model.modules() if isinstance(m, (PreTrainedModel, GradientCheckpointingLayer)))
    return {module for top in tops for module in top.modules()}


def _is_region(module: torch.nn.Module) -> bool:
    region = region_of(module)
    return region is not None and region.module() is module and region.options is not None


def _switch(module: torch.nn.Module, on: bool) -> None:
    state = module.__dict__
    if on:
        state["gradient_checkpointing"] = True
        state["_gradient_checkpointing_func"] = call
    elif state.get("_gradient_checkpointing_func") is call:
        del state["_gradient_checkpointing_func"]
        del state["gradient_checkpointing"]
        if not hasattr(type(module), "gradient_checkpointing"):
            state["gradient_checkpointing"] = False


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What transformers calls in the place of a checkpoint function: the region is around this call already."""
    return function(*args, **kwargs)


def plain(module: torch.nn.Module) -> Callable[..., bool]:
    """The test for calls that must not be regions."""
    return fills_a_cache


def fills_a_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call writes into a key-value cache, as in generation: a replay would write a second time.

    In training a layer leaves the cache out by itself, as its switch is on.
    """
    if module.training and isinstance(module, GradientCheckpointingLayer):
        return False
    for value in kwargs.values():
        if isinstance(value, Cache):
            return True
    return any(isinstance(value, Cache) for value in args)


def _guard(model: PreTrainedModel, on: bool) -> None:
    if on:
        model.__dict__["_set_gradient_checkpointing"] = refuse_switch
    elif model.__dict__.get("_set_gradient_checkpointing") is refuse_switch:
        del model.__dict__["_set_gradient_checkpointing"]


def refuse_switch(
    enable: bool = True, gradient_checkpointing_func: object = None, every_n_layers: int = 1
) -> None:
    """Stands in for ``model._set_gradient_checkpointing`` while regions are on the model.

    Raises:
        BothSwitches: always.
    """
    if enable:
        raise BothSwitches(
            "transformers' activation checkpointing was switched on for a model that dc.apply has made regions of",
            why="each layer would be recomputed twice, and one of the two settings would be ignored",
            fix="leave activation_checkpointing (gradient_checkpointing) off, or give the Trainer a DistckptCallback "
            "in the place of dc.apply",
        )
    raise BothSwitches(
        "transformers' activation checkpointing was switched off for a model that dc.apply has made regions of",
        why="its switch does not take regions off",
        fix="call remove() on the handle of dc.apply, or distckpt.modules.regions(model).remove()",
    )


def _pin_outputs(router: torch.nn.Module, on: bool) -> None:
    ours = [key for key, hook in router._forward_hooks.items() if hook is pin_decisions]
    if on and not ours:
        router.register_forward_hook(pin_decisions)
    elif not on:
        for key in ours:
            del router._forward_hooks[key]


def pin_decisions(router: torch.nn.Module, args: object, output: object) -> Any:
    """A forward hook that pins the indices among a router's outputs: which experts, decided once."""
    if torch.compiler.is_compiling():
        return None
    leaves, spec = tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and _is_index(leaf)]
    if not places:
        return None
    for place, kept in zip(places, pin([leaves[i] for i in places]), strict=True):
        leaves[place] = kept
    return tree_unflatten(leaves, spec)


def _is_index(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _outermost(model: torch.nn.Module, is_layer: Callable[[torch.nn.Module], bool]) -> list[str]:
    names: list[str] = []
    for name, module in model.named_modules():
        if is_layer(module) and not any(name.startswith(f"{above}.") or not above for above in names):
            names.append(name)
    return names


def _refuse_old_format(model: PreTrainedModel) -> None:
    if "value" in inspect.signature(model._set_gradient_checkpointing).parameters:
        raise OldFormat(
            f"{type(model).__name__} switches checkpointing in the format of transformers before 4.35",
            where=f"{type(model).__module__}.{type(model).__qualname__}._set_gradient_checkpointing(module, value)",
            why="that switch takes no function, and the model calls torch's checkpoint by itself",
            fix="name its layers, dc.apply(model, 'layers.*'), and pass use_cache=False; or remove the method from the "
            "modeling file, as transformers asks",
        )
