"""What a policy says of an operator, under torch's names."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from distckpt._torch import OriginalPolicy
from distckpt.errors import NoPolicy, OffloadRefused


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


def for_torch(policy: Any) -> Any:
    """A policy whose answers are members of torch's own enum, for torch's operator in a compiled graph."""
    if CheckpointPolicy is OriginalPolicy or not callable(policy):
        return policy

    def translated(*args: Any, **kwargs: Any) -> Any:
        answer = policy(*args, **kwargs)
        return OriginalPolicy[answer.name] if isinstance(answer, _Policy) else answer

    return translated
