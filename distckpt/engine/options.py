"""How one region behaves, apart from what it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from distckpt.errors import BadOption


class Partition(Protocol):
    """Keeps a region's inputs in another form than whole tensors (``ranks.partition``: 1/t of each on this rank)."""

    def own(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any], dict[str, Any] | None]:
        """Function, arguments and keywords as a region holds them: see :func:`distckpt.engine.inputs.own`."""
        ...


ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

DeterminismCheck = Literal["none", "default", "fingerprint", "bitwise"]
CHECKS: tuple[DeterminismCheck, ...] = ("none", "default", "fingerprint", "bitwise")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Options of a region. ``strict`` is the ``dc.*`` surface; without it the region behaves as torch's does.

    A strict region owns every tensor of its call and not only the positional ones, serves a saved tensor
    twice in one backward, changes buffers once, and raises where torch would be silently wrong.
    """

    preserve_rng_state: bool = True
    context_fn: ContextFn | None = None
    determinism_check: str | Callable[[Any], Any] = "default"
    debug: bool = False
    early_stop: bool = True
    respect_saved_tensors_hooks: bool | None = None
    name: str | None = None
    strict: bool = True
    partition: Partition | None = None

    def __post_init__(self) -> None:
        if self.determinism_check not in CHECKS and not callable(self.determinism_check):
            raise BadOption(
                f"determinism_check should be one of {list(CHECKS)}, but got {self.determinism_check!r}",
                fix='"default" compares shape, dtype and device; "fingerprint" and "bitwise" compare values',
            )
        if self.partition is not None and not callable(getattr(self.partition, "own", None)):
            raise BadOption(
                f"partition is what coord.partition(group) returns, not a {type(self.partition).__name__}",
                fix="make one per process group, p = coord.partition(group), and pass partition=p",
            )


DEFAULT = Options()
