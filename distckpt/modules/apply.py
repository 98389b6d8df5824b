"""``dc.apply``: which modules of a model were meant, what their library knows about them, and the regions on them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Protocol, TypeAlias

import torch

from distckpt import _torch
from distckpt.engine.api import make_options
from distckpt.engine.diagnose import unknown_option
from distckpt.engine.region import ContextFn, DeterminismCheck, InputKeeper, Options
from distckpt.errors import AlreadyRegion, BadChoice, BadOption, NeverCalled, NoMatch, NotAModel, UnknownModel
from distckpt.modules.module_region import ModuleRegion, region_of


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
    partition: InputKeeper | None = None,
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
    chosen = choose_modules(model, globs)
    for name, module in chosen:
        _refuse_region(module, name)
    known = libraries(model)
    for library in known:
        library.check(model)
    regions = [
        (
            name,
            ModuleRegion(
                module, Options(name=name or type(module).__name__, **options), library_says_plain(module)
            ),
        )
        for name, module in chosen
    ]
    for _, region in regions:
        region.attach()
    for library in known:
        library.settle(model)
    return Applied(regions, model)


_OPTIONS = {name for name, p in inspect.signature(apply).parameters.items() if p.kind is p.KEYWORD_ONLY}


def _not_a_model(model: object, globs: object) -> NotAModel:
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


# The choice ----------------------------------------------------------------------------------------------

Module = torch.nn.Module
One: TypeAlias = "str | type[Any] | Module | Callable[[Module], bool] | Callable[[str, Module], bool]"
Choice: TypeAlias = "One | Iterable[One]"

_FORMS = 'a glob ("layers.*"), a class, modules (model.layers), a function of a module, or several of these'


def choose_modules(model: Module, choice: Choice | None = None) -> list[tuple[str, Module]]:
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
    parts = default_layers(model) if choice is None else as_list(choice)
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


def as_list(choice: One | Iterable[Any]) -> list[Any]:
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
        NoMatch, BadChoice: as for :func:`choose_modules`.
    """
    if isinstance(part, str):
        return names_matching([part], modules)
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


def _bad(part: object, what: str) -> BadChoice:
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


# Globs: patterns over the dotted names of a model's modules ---------------------------------------------

_TOKEN = re.compile(r"\*\*\.|\*\*|\*|\?|\[!?[^\]]+\]|.", re.DOTALL)


def compile_glob(glob: str) -> re.Pattern[str]:
    """The glob as a pattern for ``fullmatch`` on a dotted name.

    ``*``, ``?`` and ``[...]`` stay within one dotted part. ``**`` crosses parts: ``a.**`` is everything
    below ``a``, ``**.a`` every ``a`` at any depth, ``a.**.b`` every ``b`` below ``a``. The empty glob is the
    model itself.
    """
    pieces: list[str] = []
    for match in _TOKEN.finditer(glob):
        token, starts_part = match.group(), match.start() == 0 or glob[match.start() - 1] == "."
        if token == "**.":
            pieces.append(r"(?:[^.]+\.)*" if starts_part else r".*\.")
        elif token == "**":
            pieces.append(".+" if starts_part else ".*")
        elif token == "*":
            alone = starts_part and glob[match.end() : match.end() + 1] in ("", ".")
            pieces.append("[^.]+" if alone else "[^.]*")
        elif token == "?":
            pieces.append("[^.]")
        elif len(token) > 1:
            pieces.append(_character_class(token))
        else:
            pieces.append(re.escape(token))
    return re.compile("".join(pieces))


def _character_class(token: str) -> str:
    negated = token.startswith("[!")
    body = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[")
    return rf"(?!\.)[{'^' if negated else ''}{body}]"


def names_matching(globs: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that any of ``globs`` matches, in the order of ``names``.

    Raises:
        NoMatch: one of the globs matches nothing, whatever the others match.
    """
    names = list(names)
    chosen: set[str] = set()
    for glob in globs:
        pattern = compile_glob(glob)
        hits = [name for name in names if pattern.fullmatch(name)]
        if not hits:
            raise _no_match(glob, names)
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _no_match(glob: str, names: list[str]) -> NoMatch:
    near = _near(glob, [name for name in names if name])
    return NoMatch(
        f"the glob {glob!r} matches no module",
        why=f"the nearest of {len(names)} module names: {', '.join(map(repr, near))}" if near else None,
        fix="globs are over the names of model.named_modules(); * stays within one dotted part, ** crosses them",
    )


def _near(glob: str, names: list[str], count: int = 4) -> list[str]:
    """Names close to ``glob``: similar spelling first, then what lies where its beginning leads."""
    close = difflib.get_close_matches(glob, names, n=count, cutoff=0.6)
    parts = glob.split(".")
    for length in range(len(parts) - 1, 0, -1):
        pattern = compile_glob(".".join(parts[:length]))
        parents = {name for name in names if pattern.fullmatch(name)}
        below = [name for name in names if name.rpartition(".")[0] in parents]
        if below:
            return list(dict.fromkeys([*close[:2], *below]))[:count]
    return close or [name for name in names if "." not in name][:count]


# Libraries: what those who define models know about them, found without importing anybody. A module belongs to one
# when a class it derives from is defined there. Its code is named here and loaded when a model of it is met, so that
# this floor and `import distckpt` need torch only.


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


_libraries: dict[str, str] = {"transformers": "distckpt.integrations.layers"}


def register_library(package: str, target: str) -> None:
    """Let models whose classes come from ``package`` be handled by the module with the dotted name ``target``.

    Example:
        >>> register_library("my_models", "my_models.distckpt_support")  # a module with the functions of Library
    """
    _libraries[package] = target


def libraries(model: torch.nn.Module) -> list[Library]:
    """The known libraries that ``model`` or a module in it belongs to."""
    found: set[str] = set()
    for kind in {type(module) for module in model.modules()}:
        found.update(_packages(kind))
    return [_load(package) for package in sorted(found)]


def library_says_plain(module: torch.nn.Module) -> Callable[..., bool] | None:
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
        why=f"a model's library has to mark them; known libraries: {', '.join(sorted(_libraries))}",
        fix=f"name them with a glob over model.named_modules(), for example dc.apply(model, {example!r})",
    )


def _packages(kind: type[Any]) -> set[str]:
    return {base.__module__.partition(".")[0] for base in kind.__mro__} & _libraries.keys()


def _load(package: str) -> Library:
    library: Any = importlib.import_module(_libraries[package])
    return library
