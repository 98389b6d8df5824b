"""Selective regions with torch's calling convention: a policy per operator, two dispatch modes.

The first mode runs around the forward and keeps the outputs that the policy wants saved; the second runs around a
replay and answers those operators from what was kept.

Note [Kept outputs]
    A kept output is found by its operator and by how many calls of that operator came before it, those included that
    raised. In a region of ``dc.*`` it may be asked for again, by a second backward or a double backward: it is
    dropped at its use only when the backward that replays the region frees the graph, and one that is gone is
    computed again. In ``compat`` a second use is torch's error. One that was changed without its own version counter
    telling is none there, as torch's engine passes over it, and is computed again. What no replay reaches, because
    nothing is saved after it, is let go when the record ends.

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

Note [One look-up]
    What depends on the operator alone is answered once per process (``operators.py``), and what depends on the region
    as well, once per region (``OperatorCalls``): the answer of a list, and whether the operator can be kept at all. A
    policy function is asked in every call.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distckpt._torch import (
    OriginalCachedMode,
    OriginalCachingMode,
    compiled_region_key,
    graph_task_id,
    ignored_operators,
    is_aot_tracing,
    keep_graph,
    original_selective_contexts,
    skip_frames_below,
    top_dispatch_mode,
    top_saved_tensors_hooks,
    user_saved_tensors_hooks,
    wait_for_collective,
    without_dispatch_modes,
)
from distckpt.engine import rng
from distckpt.engine.hooks import is_engine_hook
from distckpt.engine.region import Frame, Region, describe, here, refuse, replaying
from distckpt.errors import SavedOutputChanged, SelectiveMismatch
from distckpt.policy.operators import (
    Operator,
    SelectiveCheckpointContext,
    for_torch,
    operator,
    tensors,
    verdict,
)
from distckpt.policy.saved_outputs import (
    Changed,
    OperatorCalls,
    SavedCall,
    SavedOutput,
    SavedOutputs,
    each,
    shares_memory,
)

SAC_IGNORED_OPS = ignored_operators

_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
_CAST = torch.ops.aten._to_copy.default
_CONSUMED: Any = object()
_NOT_ASKED: Any = object()
_WHY = (
    "This can happen if the operations in the checkpointed region are nondeterministic or depend on global state that "
    "changed between forward and backward."
)
_CHANGED = "Tensor cached during selective activation checkpoint has been mutated"
_EXTRA_BACKWARD = (
    "Trying to backward an extra time. You are only allowed to backward once on any region computed under selective "
    "activation checkpoint."
)


class _Selective:
    # Subclasses of torch's modes by name only: every method that does something is ours.
    supports_higher_order_operators = True
    store: SavedOutputs
    strict = False
    _bound: SavedOutputs | None = None
    _stands_for: Any = None  # the mode that somebody entered instead
    _stood_for = False  # whether another does so for this one
    _casts = False  # under autocast: casts are neither kept nor counted

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap every dispatch; see `skip_frames_below`, which costs nothing

    def bind_region(self, region: Region) -> Any:
        """The engine says which region these contexts serve. Returns the context to use, which serves no other."""
        if region.kept is None:
            region.kept = self.store if self.store.region is None else SavedOutputs()
            region.kept.region = weakref.ref(region)
        mine = self
        if self.store is not region.kept:  # one pair for several regions
            mine = copy.copy(self)
            TorchDispatchMode.__init__(mine)  # type: ignore[arg-type]
            mine.store = region.kept
            mine._stands_for, self._stood_for = self, True
        mine._bound = region.kept
        mine.strict = region.options.strict
        mine._casts = mine.strict and region.ambient[8] is not None
        return mine

    def __enter__(self) -> Any:
        region = here.entering
        mine = self
        if region is not None and (region.kept is None or self._bound is not region.kept):
            mine = self.bind_region(
                region
            )  # a context of the user's is around this one, so nobody has asked yet
        mine.begin()
        return TorchDispatchMode.__enter__(mine)  # type: ignore[arg-type]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        mine = self
        if self._stood_for and getattr(top := top_dispatch_mode(), "_stands_for", None) is self:
            mine = top
        TorchDispatchMode.__exit__(mine, kind, error, trace)  # type: ignore[arg-type]
        mine.end(kind is None)

    def begin(self) -> None:
        """It is about to be entered."""

    def end(self, good: bool) -> None:
        """It was left, without an exception if ``good``."""

    @property
    def region(self) -> Region | None:
        ref = self.store.region
        return None if ref is None else ref()

    def _replayed_by(self) -> Region | None:
        """The region whose replay runs the present operator, see Note [Whose operators]."""
        region = self.region
        return None if region is None else replaying(region)

    def _is_beside(self, op: Operator, func: Any) -> bool:
        """Whether an operator is neither counted nor kept."""
        return op.unseen or func in SAC_IGNORED_OPS or (self._casts and func is _CAST)


class CachingMode(_Selective, OriginalCachingMode):
    """Around the forward: ask the policy, keep what it wants."""

    def __init__(
        self,
        policy_fn: Callable[..., Any] | frozenset[Any],
        store: SavedOutputs,
        ac_graph_id: int | None = None,
    ) -> None:
        TorchDispatchMode.__init__(self)
        self.policy_fn = policy_fn
        self.store = store
        self.ac_graph_id = ac_graph_id
        self.respect_saved_tensors_hooks: bool | None = None
        self._recorded: Region | None = None  # while it is
        self._outer_hooks: Any = _NOT_ASKED
        self._error: Exception | None = None

    def bind_region(self, region: Region) -> Any:
        mine = super().bind_region(region)
        mine.respect_saved_tensors_hooks = region.options.respect_saved_tensors_hooks
        return mine

    def begin(self) -> None:
        self._recorded = self.region
        self._outer_hooks = _NOT_ASKED

    def end(self, good: bool) -> None:
        r, self._recorded, self._outer_hooks = self._recorded, None, _NOT_ASKED
        if not good:
            return
        if self._error is not None:  # the function went on as if nothing had happened
            raise self._error
        if r is not None and r.early_stop and r.verifier is None and self.store.watches:
            self.store.let_go(r.reach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls = self.store.calls.get(func)
        if calls is None:
            calls = self._recorded_calls(func, args)
        r = self._recorded
        if calls.beside or (here.frame is not r and self._replayed_by() is not None):
            return func(*args, **(kwargs or {}))
        index = calls.count
        calls.count = index + 1  # also when it raises, and the function catches that
        if calls.plain:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._run(calls, index, func, args, kwargs or {})

    def _recorded_calls(self, func: Any, args: Any) -> OperatorCalls:
        op = operator(func)
        answer: bool | None = None
        if not callable(self.policy_fn):  # what a list says of an operator, in every call
            answer = func in self.policy_fn or op.effect
            if answer and (op.runs_again or (self.strict and op.views)):
                answer = False
        key = func
        if op.compiled:
            key = compiled_region_key(func, args)
            if (known := self.store.calls.get(key)) is not None:
                return known
        calls = self.store.calls[key] = OperatorCalls(op, self._is_beside(op, func), answer)
        return calls

    def _run(self, calls: OperatorCalls, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        op, keep = calls.operator, calls.answer
        before = [(s, s.get_state()) for s in self._streams()] if op.draws and keep is not False else ()
        out = func(*args, **kwargs)
        written = op.written(args, kwargs) if op.writes or op.statistics else ()
        if written:
            self.store.written(written)
        if keep is None:
            try:
                policy: Any = self.policy_fn
                ctx = SelectiveCheckpointContext(is_recompute=False, op_output=out)
                keep = verdict(policy(ctx, func, *args, **kwargs), func, op.effect, self.strict)
            except Exception as error:
                self._error = error
                raise
            keep = keep and not op.runs_again and not (self.strict and op.views)
        if op.undeclared:
            self.store.viewed(out)
        if keep and self._stands_alone(op, out, written, args, kwargs):
            self._keep(calls, index, out, before)
        return out

    def _stands_alone(self, op: Any, out: Any, written: Any, args: Any, kwargs: Any) -> bool:
        """Whether ``out`` is all that this call did: see Note [Operators that always run]."""
        if any(t.is_inference() for t in tensors(out)):  # no version counter would tell that it was changed
            return False
        if not self.strict:
            return True
        return not written and not (op.undeclared and shares_memory(out, (*args, *kwargs.values())))

    def _keep(self, calls: OperatorCalls, index: int, out: Any, before: Any) -> None:
        hooks, after, r = self._user_hooks(), None, self._recorded
        if before:
            with without_dispatch_modes():
                after = [(s, s.get_state()) for s, state in before if s.moved(state)]
        if hooks is not None and calls.operator.in_flight:
            for t in tensors(out):
                wait_for_collective(t)
        if type(out) is torch.Tensor:
            kept: Any = SavedOutput(out, hooks)
        else:
            kept = each(lambda x: SavedOutput(x, hooks) if isinstance(x, torch.Tensor) else x, out)
        self.store.keep(calls, index, SavedCall(kept, after or None, 0 if r is None else len(r.refs)))

    def _streams(self) -> list[Any]:
        """The generators that an operator may move, if a replay of this region is to find them there."""
        r = self._recorded
        if r is None or not self.strict or not r.options.preserve_rng_state:
            return []
        return [draw.stream for draw in rng.so_far(r.rng_before, r.stash)]

    def _user_hooks(self) -> Any:
        top = top_saved_tensors_hooks()
        if top is None:
            return None
        if self._recorded is not None and getattr(top[1], "__self__", None) is self._recorded:
            if self._outer_hooks is _NOT_ASKED:
                self._outer_hooks = user_saved_tensors_hooks(is_engine_hook)
            hooks = self._outer_hooks  # ours are on top, so nobody has put any on since
        else:
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

    def __init__(self, policy_fn: Any, store: SavedOutputs, allow_cache_entry_mutation: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self.store = store
        self.allow_cache_entry_mutation = allow_cache_entry_mutation
        self._last_use = False

    def begin(self) -> None:
        for calls in self.store.calls.values():
            calls.seen = 0
        # Asked now: later in the replay the running backward may be that of a gradient taken inside.
        r = self.region
        if r is not None and r.closed:
            self.store.forget()
        ends = r is not None and r.closed and r.session is None
        self._last_use = ends and graph_task_id() != -1 and not keep_graph()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls = self.store.calls.get(func)
        if calls is None:
            calls = self._unseen_calls(func, args)
        if (calls is not None and calls.beside) or not self._is_mine():
            return func(*args, **(kwargs or {}))
        index = -1
        if calls is not None:
            index = calls.seen
            calls.seen = index + 1
        if calls is None or index >= calls.count:
            return self._unknown(func, index, args, kwargs or {})
        entry = calls.kept.get(index)
        if entry is None:
            out = func(*args, **kwargs) if kwargs else func(*args)
            if not calls.plain and self.store.watches:
                self.store.written(calls.operator.written(args, kwargs or {}))
            return out
        return self._given(calls, index, entry, func, args, kwargs or {})

    def _unseen_calls(self, func: Any, args: Any) -> OperatorCalls | None:
        """Of an operator that the record did not run under this name: it may be compiled, or none of the function's."""
        op = operator(func)
        calls = self.store.calls.get(compiled_region_key(func, args)) if op.compiled else None
        if calls is None and self._is_beside(op, func):
            calls = self.store.calls[func] = OperatorCalls(op, True, None)
        return calls

    def _is_mine(self) -> bool:
        """Whether the present operator belongs to the function's one run, see Note [Whose operators]."""
        frame, ref = here.frame, self.store.region
        if ref is None:
            return True
        region = ref()
        return (type(frame) is Frame and frame.region is region) or self._replayed_by() in (None, region)

    def _given(self, calls: OperatorCalls, index: int, entry: Any, func: Any, args: Any, kwargs: Any) -> Any:
        strict = self.strict
        if entry is _CONSUMED:
            self._refuse(RuntimeError(_EXTRA_BACKWARD))
        again = strict and not self._last_use
        check = not self.allow_cache_entry_mutation
        try:
            if type(entry.out) is SavedOutput:
                out = entry.out.get(check, strict, again)
            else:
                out = each(lambda x: x.get(check, strict, again) if type(x) is SavedOutput else x, entry.out)
        except Changed:
            r = self.region
            if r is not None and entry.at >= len(r.refs):
                return func(*args, **kwargs)  # nothing was saved after it: the replay only passes by
            if not (strict or entry.moved() or calls.operator.draws):
                return func(*args, **kwargs)  # see Note [Kept outputs]
            self._refuse(
                SavedOutputChanged(
                    _CHANGED,
                    where=f"{func}, {describe(r.fn, r.options)}" if r is not None else str(func),
                    why="the replay would begin with the changed value; a view or another tensor over the same memory "
                    "may have been what was written to",
                    fix="do not select operators whose outputs are changed in place",
                )
                if strict
                else RuntimeError(_CHANGED)
            )
        if again:
            self.store.handed(entry.out)
        elif strict:
            del calls.kept[index]
        else:
            calls.kept[index] = _CONSUMED
        for stream, state in entry.after or ():
            stream.set_state(state)
        return out

    def _unknown(self, func: Any, index: int, args: Any, kwargs: Any) -> Any:
        if index < 0:
            text = f"{func} encountered during backward but not found in storage. {_WHY}"
        else:
            text = f"{func} invocation index {index} encountered during backward but not found in storage. {_WHY}"
        if not self.strict:
            self._refuse(RuntimeError(text))
        region = self.region
        assert region is not None
        if not region.closed:
            return func(*args, **kwargs)  # a replay during the record may run past its end
        self._refuse(SelectiveMismatch(text, fix="make the region depend on its inputs only"))

    def _refuse(self, error: Exception) -> NoReturn:
        region = self.region
        if region is None:
            raise error
        refuse(region, error)


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
        return original_selective_contexts(for_torch(policy_fn_or_list), allow_cache_entry_mutation)
    if isinstance(policy_fn_or_list, list):
        for op in policy_fn_or_list:
            if not isinstance(op, _OPERATORS):
                raise _no_operator(op)
        policy_fn: Any = frozenset(policy_fn_or_list)
    elif callable(policy_fn_or_list):
        policy_fn = policy_fn_or_list
    else:
        raise TypeError("policy_fn_or_list must be either a function or a list of ops.")
    store = SavedOutputs()
    return CachingMode(policy_fn, store), CachedMode(None, store, allow_cache_entry_mutation)


for _mode in (CachingMode, CachedMode):
    skip_frames_below(_mode.__torch_dispatch__)


def _no_operator(op: Any) -> ValueError:
    tip = ""
    if isinstance(op, torch._ops.OpOverloadPacket):
        tip = (
            "Please update the OpOverloadPacket to a specific OpOverload. For example, if you have "
            "`torch.ops.aten.mm`, change it to `torch.ops.aten.mm.default`."
        )
    return ValueError(f"Expected op in `op_list` to be an OpOverload but got: {op} of type {type(op)}. {tip}")
