"""Private names of torch: the tables of those that a room needs, and the versions that have been tried."""

from __future__ import annotations

import dis
import importlib
import warnings
from collections.abc import Iterator, Mapping
from types import FunctionType

import torch

from .errors import UnsupportedTorch

OLDEST, NEWEST = (2, 9), (2, 15)
"""The minor versions of torch that the suites have run on: see docs/torch-versions.md."""


def version() -> tuple[int, int]:
    """Major and minor number of the installed torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def untried() -> str | None:
    """Why this torch may behave differently, in words; None for one that has been tried."""
    if version() <= NEWEST:
        return None
    return f"torch {torch.__version__} is newer than {text(NEWEST)}, the newest that distckpt was tried on"


def warn_if_untried() -> None:
    """Warn about a torch newer than the newest tried."""
    found = untried()
    if found is not None:
        warnings.warn(found, UserWarning, stacklevel=2)


class PrivateNames:
    """The private names of torch that one room needs, by what they are for.

    A name is ``module:path``. A part of the path may be an attribute that instances of a class get in one of its
    methods. ``a|b`` is for what was renamed: one of them is enough.
    """

    def __init__(self, table: Mapping[str, tuple[str, ...]]) -> None:
        self.table = table
        self._found: set[str] = set()

    def need(self, feature: str) -> None:
        """Look for the names of ``feature``, the first time that it is asked for.

        Raises:
            UnsupportedTorch: this torch lacks some of them (DC208).
            ImportError: torch was built without ``torch.distributed``.
        """
        if feature in self._found:
            return
        missing = self.missing(feature)
        if missing:
            raise UnsupportedTorch(
                f"torch {torch.__version__} has no {', '.join(missing)}",
                where=f"needed for {feature}",
                why=f"private names come and go; distckpt was tried on torch {text(OLDEST)} to {text(NEWEST)}",
                fix=f"pip install 'torch>={text(OLDEST)},<{text((NEWEST[0], NEWEST[1] + 1))}', or a newer distckpt",
            )
        self._found.add(feature)

    def missing(self, feature: str) -> tuple[str, ...]:
        """Those names of ``feature`` that this torch lacks, as one writes them."""
        return tuple(
            name.replace(":", ".").replace("|", " or ")
            for name in self.table[feature]
            if not any(map(_exists, _alternatives(name)))
        )


def _alternatives(name: str) -> Iterator[str]:
    """``a:b.c|d`` is ``a:b.c`` or ``a:b.d``."""
    first, *others = name.split("|")
    yield first
    for other in others:
        yield f"{first.rpartition('.')[0]}.{other}"


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a torch that others have taken names out of may fail to import in any way
        if module.startswith("torch.distributed") and not torch.distributed.is_available():
            raise ImportError(f"torch was built without {module}") from error
        return False
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return isinstance(found, type) and _gives(found, part)
    return True


def _gives(kind: type, attribute: str) -> bool:
    """Whether a method of ``kind`` sets the attribute, on its instance we take it."""
    return any(
        step.opname == "STORE_ATTR" and step.argval == attribute
        for base in kind.__mro__
        for method in vars(base).values()
        if isinstance(method, FunctionType)
        for step in dis.get_instructions(method)
    )


def text(minor: tuple[int, int]) -> str:
    """``(2, 15)`` as ``"2.15"``."""
    return ".".join(map(str, minor))
