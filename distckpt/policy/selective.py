"""Selective regions with torch's calling convention: a policy per operator, two dispatch modes.

The first mode runs around the forward and keeps the outputs that the policy wants saved; the second runs around a
replay and answers those operators from what was kept.

Note [Kept outputs]
    A kept output is found by its operator and by how many calls of that operator came before it. In a region of
    ``dc.*`` it may be asked for again, by a second backward or a double backward: it is dropped at its use only when
    the backward that replays the region frees the graph, and one that is gone is computed again. In ``compat`` a second
    use is torch's error.

Note [Whose operators]
    A mode sees every operator that runs while it is on, also those of a replay that a gradient taken inside causes:
    the region's own during its record, or one of a region nested in it. How often and how far the engine replays is
    its own business and differs between record and replay, so these operators are neither counted, kept nor answered:
    only those of the function's one run are.

Note [Random operators]
    A kept output of a random operator is not drawn again, so the generators must jump to where the operator left
    them, or every later draw of the replay is another one. (Torch's selective regions do not, and their
    gradients are wrong when a kept random operator precedes a recomputed one.)

Note [Autocast]
    Autocast caches weight casts across regions, so a forward may run fewer casts than its replay, and counting them
    would shift every later one (pytorch#193338). Turning the cache off would change where gradients add up. So in
    a region of ``dc.*`` under autocast casts are never kept and never counted; they are cheap to do again.
"""

from __future__ import annotations

import enum
import functools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from distckpt._torch import (
    OriginalCachedMode,
    OriginalCachingMode,
    OriginalPolicy,
    compiled_region_key,
    graph_task_id,
    has_ordered_effect,
    ignored_operators,
    is_aot_tracing,
    keep_graph,
    original_selective_contexts,
    user_saved_tensors_hooks,
)
from distckpt.engine import rng
from distckpt.engine.region import Region
from distckpt.engine.replay import is_engine_hook
from distckpt.engine.state import replaying
from distckpt.policy.errors import NoPolicy, OffloadRefused, SelectiveMismatch
from distckpt.policy.kept import Entry, Kept


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


SAC_IGNORED_OPS = ignored_operators

_SAVE = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
_OFFLOAD = (CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD)
_CAST = torch.ops.aten._to_copy.default
_RECOMPUTE: Any = object()
_CONSUMED: Any = object()
_WHY = (
    "This can happen if the operations in the checkpointed region are nondeterministic or depend on global state that "
    "changed between forward and backward."
)

_EXTRA_BACKWARD = (
    "Trying to backward an extra time. You are only allowed to backward once on any region computed under selective "
    "activation checkpoint."
)


@functools.lru_cache(maxsize=4096)
def _aliases(func: Any) -> bool:
    """Whether an operator returns, or writes to, memory of its arguments.

    A kept view would be one of the forward's memory and not of the replay's, and a kept in-place result would leave
    the replay's tensor unwritten. Such operators are cheap, and always run again.
    """
    schema = getattr(func, "_schema", None)
    return schema is not None and (schema.is_mutable or any(r.alias_info is not None for r in schema.returns))


class _Selective:
    # Subclasses of torch's modes by name only: every method that does something is ours.
    supports_higher_order_operators = True
    _casts = False  # under autocast: casts are neither kept nor counted
    _region: weakref.ref[Region] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def bind_region(self, region: Region) -> None:
        """The engine says which region these contexts serve."""
        self._region = weakref.ref(region)  # the region holds its contexts
        self._casts = region.options.strict and region.ambient[8] is not None

    @property
    def region(self) -> Region | None:
        return None if self._region is None else self._region()

    def _is_beside(self, func: Any) -> bool:
        return func in SAC_IGNORED_OPS or (self._casts and func is _CAST)

    def _replayed_by(self) -> Region | None:
        """The region whose replay runs the present operator, see Note [Whose operators]."""
        region = self.region
        return None if region is None else replaying(region)

    @property
    def strict(self) -> bool:
        region = self.region
        return region is not None and region.options.strict


class CachingMode(_Selective, OriginalCachingMode):
    """Around the forward: ask the policy, keep what it wants."""

    def __init__(self, policy_fn: Callable[..., Any], storage: Any, ac_graph_id: int | None = None) -> None:
        TorchDispatchMode.__init__(self)
        self.policy_fn = policy_fn
        self.storage = storage
        self.ac_graph_id = ac_graph_id
        self.func_counter: dict[Any, int] = defaultdict(int)
        self.respect_saved_tensors_hooks: bool | None = None

    def bind_region(self, region: Region) -> None:
        super().bind_region(region)
        self.respect_saved_tensors_hooks = region.options.respect_saved_tensors_hooks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_beside(func) or self._replayed_by() is not None:
            return func(*args, **kwargs)
        before = [(s, s.get_state()) for s in self._streams()] if self._may_draw(func) else ()
        out = func(*args, **kwargs)
        key = compiled_region_key(func, args)
        index = self.func_counter[key]
        self.func_counter[key] += 1
        policy = self._policy(func, out, args, kwargs)
        if policy in _SAVE and not (self.strict and _aliases(func)):
            after = [(s, s.get_state()) for s, state in before if s.moved(state)]
            hooks = self._user_hooks()
            kept = tree_map(lambda x: Kept(x, hooks), out)
            self.storage[key][index] = Entry(kept, after or None)
        else:
            self.storage[key][index] = _RECOMPUTE
        return out

    def _policy(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        policy = self.policy_fn(
            SelectiveCheckpointContext(is_recompute=False, op_output=out), func, *args, **kwargs
        )
        if isinstance(policy, bool):
            return CheckpointPolicy.MUST_SAVE if policy else CheckpointPolicy.PREFER_RECOMPUTE
        if isinstance(policy, OriginalPolicy):  # torch's own enum
            policy = CheckpointPolicy[policy.name]
        elif not isinstance(policy, CheckpointPolicy):
            if self.strict:
                raise NoPolicy(
                    f"the policy answered {policy!r} for {func}",
                    why="a policy says a CheckpointPolicy or a bool of every operator; torch recomputes otherwise",
                    fix="return one on every path; CheckpointPolicy.PREFER_RECOMPUTE is what no answer means to torch",
                )
            policy = CheckpointPolicy.PREFER_RECOMPUTE
        if policy not in _SAVE and policy is not CheckpointPolicy.MUST_RECOMPUTE and has_ordered_effect(func):
            return CheckpointPolicy.MUST_SAVE
        if policy in _OFFLOAD and self.strict:
            raise OffloadRefused(
                f"the policy wants {func} offloaded to the CPU, which this version cannot do",
                why="torch accepts this policy in eager mode and silently recomputes",
                fix="return MUST_SAVE or MUST_RECOMPUTE",
            )
        return policy

    def _may_draw(self, func: Any) -> bool:
        r = self.region
        return (
            r is not None
            and r.options.strict
            and r.options.preserve_rng_state
            and torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        )

    def _streams(self) -> list[Any]:
        r = self.region
        assert r is not None
        return [draw.stream for draw in rng.so_far(r.rng_before, r.stash)]

    def _user_hooks(self) -> Any:
        hooks = user_saved_tensors_hooks(is_engine_hook)
        if hooks is None:
            return None
        respects = self.respect_saved_tensors_hooks
        if respects is None and self.strict:
            return hooks
        if respects is None:
            warnings.warn(
                "A saved_tensors_hooks context (e.g. save_on_cpu) is active around a selective activation checkpoint "
                "region. Tensors that the region keeps bypass these hooks for now and will not in a future release. "
                "Pass respect_saved_tensors_hooks=True|False to choose and to silence this warning.",
                FutureWarning,
                stacklevel=2,
            )
        return hooks if respects else None


class CachedMode(_Selective, OriginalCachedMode):
    """Around a replay: answer from what was kept."""

    def __init__(self, policy_fn: Any, storage: Any, allow_cache_entry_mutation: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self.storage = storage
        self.allow_cache_entry_mutation = allow_cache_entry_mutation
        self.func_counter: dict[Any, int] = defaultdict(int)
        self._last_use = False

    def __enter__(self) -> Any:
        self.func_counter.clear()
        # Asked now: later in the replay the running backward may be that of a gradient taken inside.
        r = self.region
        ends = r is not None and r.closed and r.session is None
        self._last_use = ends and graph_task_id() != -1 and not keep_graph()
        return TorchDispatchMode.__enter__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_beside(func) or self._replayed_by() not in (None, self.region):
            return func(*args, **(kwargs or {}))
        key = compiled_region_key(func, args)
        index = self.func_counter[key]
        self.func_counter[key] += 1
        calls = self.storage.get(key)
        if calls is None or index not in calls:
            return self._unknown(func, index, calls, args, kwargs or {})
        entry = calls[index]
        if entry is _CONSUMED and not self.strict:
            raise RuntimeError(_EXTRA_BACKWARD)
        if entry is _RECOMPUTE or entry is _CONSUMED:
            return func(*args, **(kwargs or {}))
        again = self.strict and not self._last_use
        if not again:
            calls[index] = _CONSUMED
        for stream, state in entry.after or ():
            stream.set_state(state)
        return tree_map(lambda x: x.get(self.allow_cache_entry_mutation, self.strict, again), entry.out)

    def _unknown(self, func: Any, index: int, calls: Any, args: Any, kwargs: Any) -> Any:
        if calls is None:
            text = f"{func} encountered during backward but not found in storage. {_WHY}"
        else:
            text = f"{func} invocation index {index} encountered during backward but not found in storage. {_WHY}"
        if not self.strict:
            raise RuntimeError(text)
        region = self.region
        assert region is not None
        if not region.closed:
            return func(*args, **kwargs)  # a replay during the record may run past its end
        raise SelectiveMismatch(text, fix="make the region depend on its inputs only")


def create_selective_checkpoint_contexts(
    policy_fn_or_list: Callable[..., Any] | list[Any], allow_cache_entry_mutation: bool = False
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The two contexts of a selective region; give ``functools.partial`` of this as ``context_fn``.

    Args:
        policy_fn_or_list: ``policy(ctx, op, *args, **kwargs) -> CheckpointPolicy``, or a list of operators
            (``torch.ops.aten.mm.default``) to save, everything else being recomputed.
        allow_cache_entry_mutation: do not refuse kept outputs that were changed in place.

    Raises:
        ValueError: the list holds something that is not an ``OpOverload`` or a higher-order operator.
        TypeError: neither a function nor a list.
    """
    if is_aot_tracing():
        return original_selective_contexts(_for_torch(policy_fn_or_list), allow_cache_entry_mutation)
    if isinstance(policy_fn_or_list, list):
        for op in policy_fn_or_list:
            _check_operator(op)
        chosen = frozenset(policy_fn_or_list)

        def policy_fn(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
            return CheckpointPolicy.MUST_SAVE if op in chosen else CheckpointPolicy.PREFER_RECOMPUTE

    elif callable(policy_fn_or_list):
        policy_fn = policy_fn_or_list
    else:
        raise TypeError("policy_fn_or_list must be either a function or a list of ops.")
    storage: dict[Any, dict[int, Any]] = defaultdict(dict)
    return CachingMode(policy_fn, storage), CachedMode(None, storage, allow_cache_entry_mutation)


def _for_torch(policy: Any) -> Any:
    """A policy whose answers are members of torch's own enum, for torch's operator in a compiled graph."""
    if CheckpointPolicy is OriginalPolicy or not callable(policy):
        return policy

    def translated(*args: Any, **kwargs: Any) -> Any:
        answer = policy(*args, **kwargs)
        return OriginalPolicy[answer.name] if isinstance(answer, _Policy) else answer

    return translated


def _check_operator(op: Any) -> None:
    if isinstance(op, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return
    tip = ""
    if isinstance(op, torch._ops.OpOverloadPacket):
        tip = (
            "Please update the OpOverloadPacket to a specific OpOverload. For example, if you have "
            "`torch.ops.aten.mm`, change it to `torch.ops.aten.mm.default`."
        )
    raise ValueError(f"Expected op in `op_list` to be an OpOverload but got: {op} of type {type(op)}. {tip}")
