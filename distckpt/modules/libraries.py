"""Libraries: what those who define models know about them, found without importing anybody.

A module belongs to a library when a class it derives from is defined there. The code for a library is named here and
loaded when a model of it is met, so that this floor and ``import distckpt`` need torch only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from distckpt.errors import UnknownModel


class Library(Protocol):
    """What ``dc.apply`` asks about models of one library. A module with these functions is one."""

    def layers(self, model: torch.nn.Module) -> list[str]:
        """Dotted names of the layers that ``dc.apply(model)`` makes regions; empty when there are none."""
        ...

    def check(self, model: torch.nn.Module) -> None:
        """Raise when regions and the model's own checkpointing would meet. Changes nothing."""
        ...

    def settle(self, model: torch.nn.Module) -> None:
        """Make the library's own switches agree with the regions that are on ``model`` now. Idempotent."""
        ...

    def plain(self, module: torch.nn.Module) -> Callable[..., bool] | None:
        """None, or what says of a call ``(module, args, kwargs)`` that it must not be a region. Picklable."""
        ...


_table: dict[str, str] = {"transformers": "distckpt.integrations.layers"}


def register(package: str, target: str) -> None:
    """Let models whose classes come from ``package`` be handled by the module with the dotted name ``target``.

    Example:
        >>> register("my_models", "my_models.distckpt_support")  # a module with the functions of Library
    """
    _table[package] = target


def libraries(model: torch.nn.Module) -> list[Library]:
    """The known libraries that ``model`` or a module in it belongs to."""
    found: set[str] = set()
    for kind in {type(module) for module in model.modules()}:
        found.update(_packages(kind))
    return [_load(package) for package in sorted(found)]


def plain(module: torch.nn.Module) -> Callable[..., bool] | None:
    """What the library of ``module`` says about calls that must stay plain ones."""
    for package in sorted(_packages(type(module))):
        test = _load(package).plain(module)
        if test is not None:
            return test
    return None


def default_layers(model: torch.nn.Module) -> list[str]:
    """Names of the layers that ``dc.apply(model)`` takes when it is given no glob.

    Raises:
        UnknownModel: no known library finds layers in this model.
    """
    names: list[str] = []
    for library in libraries(model):
        names.extend(library.layers(model))
    if names:
        return list(dict.fromkeys(names))
    stacks = [
        f"{name}.*" if name else "*"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1
    ]
    example = stacks[0] if stacks else "layers.*"
    raise UnknownModel(
        f"dc.apply was given no glob, and which modules of a {type(model).__name__} are its layers is not known",
        where=f"{type(model).__module__}.{type(model).__qualname__}",
        why=f"a model's library has to mark them; known libraries: {', '.join(sorted(_table))}",
        fix=f"name them with a glob over model.named_modules(), for example dc.apply(model, {example!r})",
    )


def _packages(kind: type[Any]) -> set[str]:
    return {base.__module__.partition(".")[0] for base in kind.__mro__} & _table.keys()


def _load(package: str) -> Library:
    library: Any = importlib.import_module(_table[package])
    return library
