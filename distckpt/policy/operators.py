"""One operator: what a policy says of it, and what a selective region must know of it, found out at its first call.

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

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from distckpt._torch import OriginalPolicy, has_ordered_effect, is_compiled_region
from distckpt.errors import NoPolicy, OffloadRefused

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
        return [
            t
            for i, name in places
            for t in tensors_in_argument(args[i] if i < len(args) else kwargs.get(name))
        ]


def tensors_in_argument(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments or results of an operator."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in_argument(part)


# Keyed by the operator itself, which is held by it: a key never comes to mean another one.
_operators: dict[Any, Operator] = {}


def operator(func: Any) -> Operator:
    """What is known of ``func``."""
    known = _operators.get(func)
    if known is None:
        known = _operators[func] = Operator(func)
    return known


class _Policy(enum.Enum):
    """What to do with an operator's output. ``MUST_*`` binds compilers too, ``PREFER_*`` is advice to them."""

    MUST_SAVE = 0
    PREFER_SAVE = 1
    MUST_RECOMPUTE = 2
    PREFER_RECOMPUTE = 3
    MUST_CPU_OFFLOAD = 4
    PREFER_CPU_OFFLOAD = 5


if TYPE_CHECKING:
    CheckpointPolicy = _Policy
else:  # Where torch has all six members, its enum is ours: compilers and user code compare with it by identity.
    CheckpointPolicy = (
        OriginalPolicy if set(_Policy.__members__) <= set(OriginalPolicy.__members__) else _Policy
    )


class SelectiveCheckpointContext:
    """First argument of a policy function. ``op_output`` is what the operator returned.

    The policy is asked in the forward only, so ``is_recompute`` is always False; it exists for old code.
    """

    def __init__(self, *, is_recompute: bool, op_output: Any = None) -> None:
        self.is_recompute = is_recompute
        self.op_output = op_output


_SAVE = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
_OFFLOAD = (CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD)


def verdict(policy: Any, func: Any, effect: bool, strict: bool) -> bool:
    """Whether a policy's answer for ``func`` means that its output is kept.

    ``effect``: running it twice does harm, so only ``MUST_RECOMPUTE`` lets it run again.

    Raises:
        NoPolicy: ``strict``, and it is no answer.
        OffloadRefused: ``strict``, and it asks for offload.
    """
    if isinstance(policy, bool):
        return policy
    if isinstance(policy, OriginalPolicy):  # torch's own enum
        policy = CheckpointPolicy[policy.name]
    elif not isinstance(policy, CheckpointPolicy):
        if strict:
            raise NoPolicy(
                f"the policy answered {policy!r} for {func}",
                why="a policy says a CheckpointPolicy or a bool of every operator; torch recomputes otherwise",
                fix="return one on every path; CheckpointPolicy.PREFER_RECOMPUTE is what no answer means to torch",
            )
        policy = CheckpointPolicy.PREFER_RECOMPUTE
    if policy in _SAVE or (effect and policy is not CheckpointPolicy.MUST_RECOMPUTE):
        return True
    if policy in _OFFLOAD and strict:
        raise OffloadRefused(
            f"the policy wants {func} offloaded to the CPU, which this version cannot do",
            why="torch accepts this policy in eager mode and silently recomputes",
            fix="return MUST_SAVE or MUST_RECOMPUTE",
        )
    return False


def torch_policy(policy: Any) -> Any:
    """A policy whose answers are members of torch's own enum, for torch's operator in a compiled graph."""
    if CheckpointPolicy is OriginalPolicy or not callable(policy):
        return policy

    def translated(*args: Any, **kwargs: Any) -> Any:
        answer = policy(*args, **kwargs)
        return OriginalPolicy[answer.name] if isinstance(answer, _Policy) else answer

    return translated
