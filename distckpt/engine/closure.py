"""Closure: what the functions of a call read by name from outside, as it was when the region was recorded.

Note [Names]
    A Python function reads the cells it closes over and the globals of its module when it runs, so a replay would
    read what they hold by then. A region keeps what they held: tensors as owned inputs, everything else by reference.
    The function itself is one, and so are those in its arguments, partials, defaults and cells, and those of its
    own file that it calls by a global name. If a name holds something else at the replay, the functions that read it
    are built anew around the kept values; the others stay the objects that they are. A name that one of them assigns
    (``nonlocal``, ``global``) is their state and stays live. Not walked are methods of modules and torch's own
    functions (their globals are the library's state), and what lies in a list, dict or object that a name holds.
"""

from __future__ import annotations

import dis
from functools import partial
from operator import attrgetter, is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from distckpt.engine.inputs import OWNED, Scan, Wrapping, give_back, parts_of

_Tensor = torch.Tensor
_ABSENT: Any = object()  # a name that nothing is bound to
_LIVE: Any = object()  # a name that is read as it is at the replay
_LIBRARIES = frozenset({"torch", "distckpt", "distckpt_backends"})
# what is neither a tensor nor holds a function, and is most of what a function reads
_PLAIN = frozenset({int, float, bool, str, type(None), ModuleType, BuiltinFunctionType, type, object})
_contents = attrgetter("cell_contents")
_NORMALISATIONS = frozenset({"batch_norm", "native_batch_norm"})
_HOLDERS = (FunctionType, MethodType, partial, tuple, Wrapping)


class Names:
    """The names that a code object, with the functions inside it, reads or assigns outside itself."""

    __slots__ = ("absent", "assigned", "assigns", "code", "globals", "live_cells", "looks", "normalises")

    def __init__(self, code: CodeType, library: bool) -> None:
        self.code = code  # alive, so that no other gets its identity
        read, assigned = _globals(code)
        cells = _assigned_cells(code, frozenset(code.co_freevars))
        self.globals = () if library else tuple(read - assigned)
        self.assigned = () if library else tuple(assigned)
        self.absent = (_ABSENT,) * len(self.globals)
        self.live_cells = [i for i, name in enumerate(code.co_freevars, len(self.globals)) if name in cells]
        self.assigns = bool(self.assigned or cells)
        self.normalises = _normalises(code)
        self.looks = self.assigns or self.normalises  # what it does with a name matters


_names: dict[
    int, Names
] = {}  # by identity: hashing a code object reads all of it, 0.2 to 1.5 us in each record


def _find_names(fn: FunctionType) -> Names:
    library = str(fn.__globals__.get("__name__")).partition(".")[0] in _LIBRARIES
    found = _names[id(fn.__code__)] = Names(fn.__code__, library)
    return found


def _globals(code: CodeType) -> tuple[set[str], set[str]]:
    read: set[str] = set()
    assigned: set[str] = set()
    for step in dis.get_instructions(code):
        # in the body of a class LOAD_NAME falls through to the globals
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            read.add(step.argval)
        elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned.add(step.argval)
    for inner in code.co_consts:
        if type(inner) is CodeType:
            more = _globals(inner)
            read |= more[0]
            assigned |= more[1]
    return read, assigned


def _normalises(code: CodeType) -> bool:
    return not _NORMALISATIONS.isdisjoint(code.co_names) or any(
        _normalises(inner) for inner in code.co_consts if type(inner) is CodeType
    )


def _assigned_cells(code: CodeType, free: frozenset[str]) -> set[str]:
    found = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in free
    }
    for inner in code.co_consts:
        if type(inner) is CodeType:
            found |= _assigned_cells(inner, free.intersection(inner.co_freevars))
    return found


class Captured:
    """One function, and what its names held: globals, cells, defaults, in this order."""

    __slots__ = ("fn", "names", "values")

    fn: FunctionType
    names: Names
    values: list[Any]


def _captured(fn: FunctionType, names: Names, values: list[Any]) -> Captured:
    c = Captured()
    c.fn, c.names, c.values = fn, names, values
    return c


def _held(fn: FunctionType, names: Names) -> list[Any]:
    # no loop of Python's own in the common case: this runs once in every record and every replay
    values = list(map(fn.__globals__.get, names.globals, names.absent)) if names.globals else []
    cells = fn.__closure__
    if cells:
        try:
            values += map(_contents, cells)
        except ValueError:  # a name that is not assigned yet
            del values[len(names.globals) :]
            values += map(_contents_or_absent, cells)
        for i in names.live_cells:
            values[i] = _LIVE
    if fn.__defaults__:
        values += fn.__defaults__
    if fn.__kwdefaults__:
        values += fn.__kwdefaults__.values()
    return values


def _contents_or_absent(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def capture_plainly(fn: FunctionType) -> tuple[Names, list[Any]] | None:
    """What ``fn`` reads by name if all of it is plain; None where :func:`capture` must look."""
    names = _names.get(id(fn.__code__)) or _find_names(fn)
    if names.looks or fn.__defaults__ is not None or fn.__kwdefaults__ is not None:
        return None
    # Loops, and no calls of other functions: in a training step this code is cold, and that saves 4 us of a region.
    values: list[Any] = []
    if names.globals:
        scope = fn.__globals__
        for name in names.globals:
            value = scope.get(name, _ABSENT)
            if type(value) not in _PLAIN:
                return None
            values.append(value)
    if fn.__closure__ is not None:
        for cell in fn.__closure__:
            try:
                value = cell.cell_contents
            except ValueError:  # a name that is not assigned yet
                return None
            if type(value) not in _PLAIN:
                return None
            values.append(value)
    return names, values


def names_unchanged(fn: FunctionType, plain: tuple[Names, list[Any]]) -> bool:
    """Whether the names of ``fn`` hold what :func:`capture_plainly` found."""
    names, values = plain
    i = 0
    if names.globals:
        scope = fn.__globals__
        for name in names.globals:
            if scope.get(name, _ABSENT) is not values[i]:
                return False
            i += 1
    if fn.__closure__ is not None:
        try:
            for cell in fn.__closure__:
                if cell.cell_contents is not values[i]:
                    return False
                i += 1
        except ValueError:  # deleted since
            return False
    return True


def captured_plainly(fn: FunctionType, plain: tuple[Names, list[Any]]) -> list[Captured]:
    """The same as :func:`capture` would have found."""
    return [_captured(fn, *plain)] if plain[1] else []


def capture(fn: Any, scan: Scan) -> list[Captured] | None:
    """What ``fn``, the functions that ``scan`` met and those that they reach read by name; None: nothing.

    ``scan`` is told whether a name of ``fn`` may lead to a module.
    """
    found = [fn] if type(fn) is FunctionType else _functions_in(fn)
    if scan.functions:
        found = _distinct([*found, *(f for called in scan.functions for f in _functions_in(called))])
    kept: list[Captured] = []
    helpers: list[FunctionType] = []
    assigns = False
    for f in found:  # grows while it is walked
        names = _names.get(id(f.__code__)) or _find_names(f)
        values = _held(f, names)
        assigns = assigns or names.assigns
        scan.normalises = scan.normalises or names.normalises
        for i, value in enumerate(values):
            if type(value) in _PLAIN:
                continue
            if isinstance(value, _Tensor):
                if scan.hooked:
                    scan.captured = [*(scan.captured or ()), value]
                values[i] = scan.tensor(value)
            elif isinstance(value, torch.Generator):
                scan.generator(value)
            else:
                scan.modules = True
                if isinstance(value, _HOLDERS):
                    reached = _functions_in(value)
                    if i < len(names.globals):
                        helpers += [g for g in reached if g.__globals__ is f.__globals__]
                    else:
                        found += [g for g in reached if all(g is not other for other in found)]
        if values:
            kept.append(_captured(f, names, values))
    if helpers:
        assigns = _capture_helpers(kept, helpers, scan) or assigns
    if assigns:
        scan.modules = True
        if len(kept) > 1:
            _leave_assigned(kept)
    return kept or None


def _capture_helpers(kept: list[Captured], helpers: list[FunctionType], scan: Scan) -> bool:
    """Functions that others call by a global name. What they read may be for other calls: kept, but not owned."""
    seen = {id(c.fn) for c in kept}
    assigns = False
    for f in helpers:  # grows while it is walked
        if id(f) not in seen:
            seen.add(id(f))
            names = _names.get(id(f.__code__)) or _find_names(f)
            scan.normalises = scan.normalises or names.normalises
            values = _held(f, names)
            for value in values:
                if isinstance(value, torch.Generator):
                    scan.generator(value)
                elif isinstance(value, _Tensor):
                    scan.note_parameter(value)
                elif type(value) not in _PLAIN and isinstance(value, _HOLDERS):
                    helpers += [g for g in _functions_in(value) if g.__globals__ is f.__globals__]
            if values:
                kept.append(_captured(f, names, values))
                assigns = assigns or names.assigns
    return assigns


def _functions_in(value: Any) -> list[FunctionType]:
    """The functions that calling ``value`` may run, as far as it is built of parts that nobody can change."""
    if type(value) is FunctionType:
        return [value]
    if type(value) is MethodType:
        return [] if isinstance(value.__self__, torch.nn.Module) else _functions_in(value.__func__)
    if isinstance(value, Wrapping):
        return _functions_in(value.function)
    if type(value) is partial:
        value = (value.func, *value.args, *value.keywords.values())
    if type(value) is not tuple:
        return []
    return [f for part in value if type(part) not in _PLAIN for f in _functions_in(part)]


def _distinct(functions: list[FunctionType]) -> list[FunctionType]:
    return list({id(f): f for f in functions}.values())


def _leave_assigned(kept: list[Captured]) -> None:
    """A name that one function assigns is read live by all of them."""
    names = {(id(c.fn.__globals__), name) for c in kept for name in c.names.assigned}
    cells = {
        id(cell)
        for c in kept
        for i, cell in enumerate(c.fn.__closure__ or (), len(c.names.globals))
        if i in c.names.live_cells
    }
    for c in kept:
        scope, known = id(c.fn.__globals__), len(c.names.globals)
        for i, name in enumerate(c.names.globals):
            if (scope, name) in names:
                c.values[i] = _LIVE
        for i, cell in enumerate(c.fn.__closure__ or (), known):
            if id(cell) in cells:
                c.values[i] = _LIVE


def held_tensors(kept: list[Captured]) -> list[torch.Tensor]:
    """What now stands where the names held an owned tensor."""
    return [
        now
        for c in kept
        for value, now in zip(c.values, _held(c.fn, c.names), strict=True)
        if type(value) in OWNED
    ]


def _name(c: Captured, i: int) -> str:
    names = (*c.names.globals, *c.fn.__code__.co_freevars)
    return names[i] if i < len(names) else "a default"


class Renewed:
    """The functions of a call whose names hold something else now, built anew around what they held."""

    __slots__ = ("assigned", "functions")

    def __init__(self, functions: dict[int, FunctionType], assigned: list[Any]) -> None:
        self.functions = functions
        self.assigned = assigned  # (new globals, the real ones, names that a function may have assigned)

    def call(self, fn: Any) -> Any:
        """``fn`` with its functions exchanged; what it assigns to globals reaches the real ones."""
        fn = self.value(fn)
        if not self.assigned:
            return fn

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return fn(*args, **kwargs)
            finally:
                for new, real, names in self.assigned:
                    for name in names:
                        if name in new:
                            real[name] = new[name]
                        else:
                            real.pop(name, None)

        return run

    def value(self, value: Any, inside: tuple[Any, ...] = ()) -> Any:
        """``value`` with the functions in it exchanged; itself when there are none, or when it is ``inside`` itself."""
        kind = type(value)
        if kind in _PLAIN or isinstance(value, _Tensor):
            return value
        if kind is FunctionType:
            return self.functions.get(id(value), value)
        if kind is MethodType:
            fn = self.functions.get(id(value.__func__))
            return value if fn is None else MethodType(fn, value.__self__)
        if isinstance(value, Wrapping):
            fn = self.value(value.function)
            return value if fn is value.function else value.around(fn)
        opened = parts_of(value)
        if opened is None or any(value is around for around in inside):
            return value
        inside = (*inside, value)
        parts = [self.value(part, inside) for part in opened[0]]
        same = all(part is old for part, old in zip(parts, opened[0], strict=True))
        return value if same else opened[1]()(parts)


def recall(kept: list[Captured], memo: dict[int, Any] | None) -> tuple[list[torch.Tensor], Renewed | None]:
    """The owned tensors among what the names held; and new functions, if a name holds something else now.

    Raises:
        InputChanged: a captured tensor was changed in place.
    """
    if all(all(map(is_, _held(c.fn, c.names), c.values)) for c in kept):
        return [], None
    owned: list[torch.Tensor] = []
    held: list[list[Any]] = []
    stale: set[int] = set()
    scopes: set[int] = set()  # globals in which a name holds something else
    for c in kept:
        values = c.values
        known = len(c.names.globals)
        for i, now in enumerate(_held(c.fn, c.names)):
            value = values[i]
            if type(value) in OWNED:
                value = give_back(value, f"{_name(c, i)} (captured)", memo)
                owned.append(value)
                if values is c.values:
                    values = list(values)
                values[i] = value
            if value is not now and value is not _LIVE:
                stale.add(id(c.fn))
                if i < known:
                    scopes.add(id(c.fn.__globals__))
        held.append(values)
    return owned, _renew(kept, held, stale, scopes) if stale else None


def _renew(kept: list[Captured], held: list[list[Any]], stale: set[int], scopes: set[int]) -> Renewed:
    grown = True
    while grown:  # a function that reaches one that is built anew is built anew as well
        grown = False
        for c, values in zip(kept, held, strict=True):
            for i, value in enumerate(values):
                if type(value) in _PLAIN or isinstance(value, _Tensor) or not isinstance(value, _HOLDERS):
                    continue
                if any(id(f) in stale for f in _functions_in(value)):
                    if i < len(c.names.globals) and id(c.fn.__globals__) not in scopes:
                        scopes.add(id(c.fn.__globals__))
                        grown = True
                    if id(c.fn) not in stale:
                        stale.add(id(c.fn))
                        grown = True
    globals_: dict[int, dict[str, Any]] = {}
    new = Renewed({}, [])
    again: list[tuple[Captured, list[Any], FunctionType]] = []
    for c, values in zip(kept, held, strict=True):
        if id(c.fn) in stale:
            real = c.fn.__globals__
            scope = real
            if id(real) in scopes:
                scope = globals_.setdefault(id(real), {})
                if not scope:
                    scope.update(real)
                if c.names.assigned:
                    new.assigned.append((scope, real, c.names.assigned))
            fn = _empty(c, values, scope)
            new.functions[id(c.fn)] = fn
            again.append((c, values, fn))
    for c, values, fn in again:
        _fill(c, [new.value(value) for value in values], fn)
    return new


def _empty(c: Captured, values: list[Any], scope: dict[str, Any]) -> FunctionType:
    old, known = c.fn, len(c.names.globals)
    cells = tuple(
        cell if values[i] is _LIVE else CellType() for i, cell in enumerate(old.__closure__ or (), known)
    )
    fn = FunctionType(old.__code__, scope, old.__name__, None, cells)
    fn.__qualname__, fn.__module__, fn.__doc__ = old.__qualname__, old.__module__, old.__doc__
    fn.__dict__ = old.__dict__  # the very same: what is kept on a function stays on it
    return fn


def _fill(c: Captured, values: list[Any], fn: FunctionType) -> None:
    rest = iter(values)
    scope, real = fn.__globals__, c.fn.__globals__
    for name, value in zip(c.names.globals, rest, strict=False):
        if scope is real or value is _LIVE:
            continue
        if value is _ABSENT:
            scope.pop(name, None)
        else:
            scope[name] = value
    for cell, value in zip(fn.__closure__ or (), rest, strict=False):
        if value is not _LIVE and value is not _ABSENT:
            cell.cell_contents = value
    if c.fn.__defaults__:
        fn.__defaults__ = tuple(value for _, value in zip(c.fn.__defaults__, rest, strict=False))
    if c.fn.__kwdefaults__:
        fn.__kwdefaults__ = dict(zip(c.fn.__kwdefaults__, rest, strict=True))
