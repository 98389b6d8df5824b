"""What a selective region must know of an operator, found out at its first call in the process.

Note [Operators that always run]
    A kept result stands in for its operator in a replay. So an operator that does more than return new memory cannot
    be kept: one that writes into an argument would leave the replay's argument unwritten, and one that returns memory
    of an argument would hand out the forward's. Most schemas say so. These do not:

    - ``c10d``: its collectives fill their ``tensors`` or ``outputs``, and a send whose receive runs again must run
      again as well. They move no version counter either.
    - ``wait_tensor`` returns its argument. Where the collective itself was kept, nothing is left to wait for.
    - What ends in an underscore and says nothing of it.
    - Batch normalisation writes running statistics.
    - The unsafe views share memory under a version counter of their own.
    - Operators that somebody registered do anything: what they return is looked at in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from distckpt._torch import has_ordered_effect, is_compiled_region

_UNSAFE_VIEWS = frozenset({"_unsafe_view", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"})
_BATCH_NORMS = frozenset(
    {
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts",
        "batch_norm_update_stats",
    }
)
_STATISTICS = ("running_mean", "running_var")
_KNOWN = frozenset({"", "aten", "prim", "prims", "c10d", "_c10d_functional"})
_WAIT = "_c10d_functional::wait_tensor"


class Operator:
    """The answers for one operator. They do not change, so all regions and threads share them."""

    __slots__ = (
        "compiled",
        "draws",
        "effect",
        "in_flight",
        "runs_again",
        "statistics",
        "training",
        "undeclared",
        "unseen",
        "views",
        "writes",
    )

    def __init__(self, func: Any) -> None:
        schema = getattr(func, "_schema", None)
        full = "" if schema is None else schema.name
        space, _, name = full.partition("::")
        self.unseen = space == "profiler"  # the mark of one run means nothing in another
        self.compiled = is_compiled_region(func)
        self.effect = has_ordered_effect(func)
        self.draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        self.in_flight = space.startswith("_c10d_functional")  # the result may still be on its way
        self.views = schema is not None and any(r.alias_info is not None for r in schema.returns)
        # its result may share memory with an argument and not the version counter
        self.undeclared = not self.views and (name in _UNSAFE_VIEWS or space not in _KNOWN)
        self.writes: tuple[tuple[int, str], ...] = ()
        self.statistics: tuple[tuple[int, str], ...] = ()
        self.training: int | None = None
        if schema is not None:
            places = list(enumerate(schema.arguments))
            if schema.is_mutable:
                writes = [(i, a) for i, a in places if a.alias_info is not None and a.alias_info.is_write]
            elif name.endswith("_") and not name.endswith("__"):
                writes = [(i, a) for i, a in places if not a.name.startswith("input")]
            else:
                writes = []
            if name in _BATCH_NORMS:
                self.statistics = tuple((i, a.name) for i, a in places if a.name in _STATISTICS)
                self.training = next((i for i, a in places if a.name == "training"), None)
            self.writes = tuple((i, a.name) for i, a in writes)
        self.runs_again = bool(self.writes) or space == "c10d" or full == _WAIT

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that this call writes into."""
        places = self.writes or self.statistics
        if self.training is not None and not args[self.training]:
            places = ()
        return [t for i, name in places for t in tensors(args[i] if i < len(args) else kwargs.get(name))]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments or results of an operator."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


# Keyed by the operator itself, which is held by it: a key never comes to mean another one.
_operators: dict[Any, Operator] = {}


def operator(func: Any) -> Operator:
    """What is known of ``func``."""
    known = _operators.get(func)
    if known is None:
        known = _operators[func] = Operator(func)
    return known
