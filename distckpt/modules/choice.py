"""Choice: which modules of a model ``dc.apply`` was asked for, in each form that people write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

from distckpt.errors import BadChoice, NeverCalled, NoMatch
from distckpt.modules.globs import select
from distckpt.modules.libraries import default_layers

Module = torch.nn.Module
One: TypeAlias = "str | type[Any] | Module | Callable[[Module], bool] | Callable[[str, Module], bool]"
Choice: TypeAlias = "One | Iterable[One]"

_FORMS = 'a glob ("layers.*"), a class, modules (model.layers), a function of a module, or several of these'


def choose(model: Module, choice: Choice | None = None) -> list[tuple[str, Module]]:
    """The modules that ``choice`` means: those with a forward, each once, in ``named_modules()`` order.

    Raises:
        NoMatch: a part of the choice is no module of the model, or there is no part (DC301).
        NeverCalled: a part means only containers (DC303).
        BadChoice: a part is in no form that is known (DC306).
        UnknownModel, OldFormat: no choice, and no known library has layers in this model (DC601, DC602).
    """
    # With its duplicates: a shared module may be named by any of its names, and is chosen once.
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[Module, str] = {}
    parts = default_layers(model) if choice is None else parts_of(choice)
    if not parts:
        raise NoMatch(
            "the choice of modules is empty",
            why="no module would become a region, and the model would need as much memory as before",
            fix='name some, for example dc.apply(model, "layers.*")',
        )
    for part in parts:
        names = _names(part, model, modules)
        called = [name for name in names if _has_forward(modules[name])]
        if not called:
            raise _never_called(part, modules, names)
        for name in called:
            chosen.setdefault(modules[name], name)
    order = {name: place for place, name in enumerate(modules)}
    return sorted(((name, module) for module, name in chosen.items()), key=lambda item: order[item[0]])


def parts_of(choice: One | Iterable[Any]) -> list[Any]:
    """A choice as the list of what was written, with lists of modules taken apart. Nothing is refused here."""
    if isinstance(choice, Module):
        return _members(choice)
    if isinstance(choice, (str, type, bytes, Mapping)) or not isinstance(choice, Iterable):
        return [choice]
    return [one for part in choice for one in (_members(part) if isinstance(part, Module) else [part])]


def _members(module: Module) -> list[One]:
    """The module itself; for a list or dict of modules, which is never called, what is in it."""
    if _has_forward(module):
        return [module]
    return [one for child in module.children() for one in _members(child)]


def _names(part: One, model: Module, modules: dict[str, Module]) -> list[str]:
    """The names that one part of the choice means.

    Raises:
        NoMatch, BadChoice: as for :func:`choose`.
    """
    if isinstance(part, str):
        return select([part], modules)
    if isinstance(part, Module):
        what, test = f"a module {type(part).__name__}", lambda name, module: module is part
    elif isinstance(part, type):
        if not issubclass(part, Module) and not any(isinstance(module, part) for module in modules.values()):
            raise _bad(part, f"the class {part.__name__}, which is no module class")
        what, test = f"the class {part.__qualname__}", lambda name, module: isinstance(module, part)
    elif callable(part) and not isinstance(part, (torch.Tensor, Mapping)):
        what, test = f"the function {getattr(part, '__qualname__', part)!s}", _predicate(part)
    else:
        raise _bad(part, f"a {type(part).__name__}")
    found = [name for name, module in model.named_modules() if test(name, module)]
    if not found:
        kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
        raise NoMatch(
            f"{what} matches no module of the {type(model).__name__}",
            why=f"its modules are of the classes {', '.join([*kinds][:8])}",
            fix=f"choose by {_FORMS}",
        )
    return found


def _predicate(function: Callable[..., Any]) -> Callable[[str, Module], Any]:
    """``function`` as one of a name and a module; it may take the module alone.

    Raises:
        BadChoice: it takes neither.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that has none
        return lambda name, module: function(module)
    asks_twice = "recurse" in signature.parameters  # a wrap policy of FSDP1: its answers mean something else
    for count, call in () if asks_twice else ((1, lambda name, module: function(module)), (2, function)):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return call
    raise _bad(function, f"a function with the parameters {signature}")


def _bad(part: Any, what: str) -> BadChoice:
    return BadChoice(
        f"modules cannot be chosen by {what}",
        fix=f"choose by {_FORMS}; a function takes a module, or its name and the module",
    )


def _has_forward(module: Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not Module.forward


def _never_called(part: One, modules: dict[str, Module], names: list[str]) -> NeverCalled:
    kinds = ", ".join(sorted({f"{name or 'the model'} ({type(modules[name]).__name__})" for name in names}))
    what = f"the glob {part!r}" if isinstance(part, str) else "the choice"
    inside = part if isinstance(part, str) else names[0]
    return NeverCalled(
        f"{what} matches only modules that are never called: {kinds}",
        why="they have no forward, so nothing would be recomputed",
        fix=f"name the modules inside, for example {inside + '.*'!r}",
    )
