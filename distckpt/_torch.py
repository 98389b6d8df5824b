"""The one room for private torch APIs, each with what it is for and a guard. (So it has over 500 lines.)

Supported: torch 2.9 to 2.15. A name that only some of them have is replaced here. One that all of them have stands in
``NAMES``, and a torch without it raises ``UnsupportedTorch`` when the feature is first needed, never at import of an
unrelated one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from distckpt_backends.private import PrivateNames, warn_if_untried
from torch.utils import _pytree

NAMES = PrivateNames(
    {
        "regions": (
            "torch._C._autograd:SavedTensor",
            "torch._C._autograd:_push_saved_tensors_default_hooks",
            "torch._C._autograd:_pop_saved_tensors_default_hooks",
            "torch._C._autograd:_top_saved_tensors_default_hooks",
            "torch._C._autograd:_get_current_graph_task_keep_graph",
            "torch._C._dynamo.eval_frame:get_eval_frame_callback",
            "torch._C._dynamo.eval_frame:set_code_exec_strategy",
            "torch._C._dynamo.eval_frame:_FrameAction",
            "torch._C._dynamo.eval_frame:_FrameExecStrategy",
            "torch._C:_current_autograd_node",
            "torch._C:_current_graph_task_id",
            "torch._C:_get_deterministic_algorithms",
            "torch._C:_get_deterministic_algorithms_warn_only",
            "torch._C:_get_dispatch_mode",
            "torch._C:_get_obj_in_tls",
            "torch._C:_get_graph_executor_optimize",
            "torch._C:_is_any_autocast_enabled",
            "torch._C:_is_key_in_tls",
            "torch._C:_last_executed_optimized_graph",
            "torch._C:_len_torch_dispatch_stack",
            "torch._C:_len_torch_function_stack",
            "torch._C:_set_grad_enabled",
            "torch._C:_set_graph_executor_optimize",
            "torch._C:_stash_obj_in_tls",
            "torch._C:DispatchKey.ADInplaceOrView",
            "torch._C:_dispatch_tls_is_dispatch_key_excluded",
            "torch._C:_dispatch_tls_set_dispatch_key_excluded",
            "torch._C:_TorchDispatchModeKey",
            "torch._C:_get_cudnn_sdp_enabled",
            "torch._C:_get_flash_sdp_enabled",
            "torch._C:_get_math_sdp_enabled",
            "torch._C:_get_mem_efficient_sdp_enabled",
            "torch._C:_get_sdp_priority_order",
            "torch._C:_set_sdp_priority_order",
            "torch._C:_set_sdp_use_cudnn",
            "torch._C:_set_sdp_use_flash",
            "torch._C:_set_sdp_use_math",
            "torch._C:_set_sdp_use_mem_efficient",
            "torch._guards:TracingContext",
            "torch._ops:HigherOrderOperator",
            "torch._ops:OpOverload",
            "torch._ops:OpOverloadPacket",
            "torch.autograd:Variable._execution_engine.queue_callback",
            "torch.autograd:_get_sequence_nr",
            "torch.autograd:_is_checkpoint_valid",
            "torch.autograd:_unsafe_preserve_version_counter",
            "torch.nn.modules.batchnorm:_NormBase",
            "torch.overrides:_get_current_function_mode_stack",
            "torch.utils._device:DeviceContext",
            "torch.utils._python_dispatch:_disable_current_modes",
            "torch.utils._python_dispatch:_get_current_dispatch_mode",
            "torch.utils._python_dispatch:TorchDispatchMode",
            "torch.utils._pytree:SUPPORTED_NODES",
            "torch.utils._pytree:_get_node_type",
            "torch.utils._pytree:tree_flatten",
            "torch.utils._pytree:tree_leaves",
            "torch.utils._pytree:tree_unflatten",
            "torch.utils.checkpoint:SAC_IGNORED_OPS",
            "torch.utils.checkpoint:_allowed_determinism_checks_to_fns",
            "torch.utils.checkpoint:_CachedTorchDispatchMode",
            "torch.utils.checkpoint:_CachingTorchDispatchMode",
            "torch:Tensor._version",
            "torch:UntypedStorage._cdata",
        ),
        "torch's module wrappers": (
            "torch.distributed._composable.contract:_get_registry",
            "torch.distributed._composable.contract:_State",
            "torch.distributed._composable.contract:contract",
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:CheckpointWrapper",
        ),
    }
)
NAMES.need("regions")
warn_if_untried()

_guards: Any = importlib.import_module("torch._guards")  # imported by torch itself
_autograd: Any = torch._C._autograd  # type: ignore[attr-defined]


class _Keep(torch.autograd.Function):
    """A node whose only purpose is to hold one saved tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(anchor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return anchor.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def jvp(ctx: object, *tangents: Any) -> Any:
        return tangents[0]  # nobody asks for it, but forward-mode AD insists that it exists


class _NodeSaved:
    """A saved tensor for torch 2.9, which has the class but no way to make one: version checked, through the
    saved-tensor hooks, exactly as a node's own, at the price of a node."""

    __slots__ = ("_out",)

    def __init__(self, tensor: torch.Tensor, is_output: bool = False) -> None:
        with torch.enable_grad():
            # the output, as the node's Python object alone does not keep the saved tensor
            self._out: Any = _Keep.apply(torch.empty(0, requires_grad=True), tensor)

    def unpack(self) -> torch.Tensor:
        return self._out.grad_fn.saved_tensors[0]


# Torch's own objects, bound before anybody can replace their names (``compat.install``).
_ORIGINALS: Any = torch.utils.checkpoint  # type: ignore[attr-defined]
original_checkpoint = _ORIGINALS.checkpoint
original_selective_contexts = _ORIGINALS.create_selective_checkpoint_contexts
OriginalPolicy = _ORIGINALS.CheckpointPolicy
OriginalCachingMode: Any = (
    _ORIGINALS._CachingTorchDispatchMode
)  # users subclass the two and test with isinstance
OriginalCachedMode: Any = _ORIGINALS._CachedTorchDispatchMode
user_determinism_checks: dict[str, Any] = _ORIGINALS._allowed_determinism_checks_to_fns  # users add to it
noop_context_fn = _ORIGINALS.noop_context_fn  # torch compares with it by identity
ignored_operators: set[Any] = _ORIGINALS.SAC_IGNORED_OPS
GENERATOR, GENERATOR_IMPL = (  # what its own `checkpoint` calls to open a region, up to 2.13 and from 2.14
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
original_generators: dict[str, Callable[..., Any]] = {
    name: vars(_ORIGINALS)[name] for name in (GENERATOR, GENERATOR_IMPL) if name in vars(_ORIGINALS)
}

# Hot names: bound once, called once or more per region. Present from 2.9 to 2.15 but for _make_saved_tensor (2.10).
make_saved_tensor: Callable[..., Any] = getattr(_autograd, "_make_saved_tensor", _NodeSaved)
SavedTensor: type = _autograd.SavedTensor if make_saved_tensor is not _NodeSaved else _NodeSaved
push_saved_tensors_hooks = _autograd._push_saved_tensors_default_hooks  # type: ignore[attr-defined]
pop_saved_tensors_hooks = _autograd._pop_saved_tensors_default_hooks  # type: ignore[attr-defined]
graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
deterministic_algorithms: Callable[[], bool] = torch._C._get_deterministic_algorithms
deterministic_warn_only: Callable[[], bool] = torch._C._get_deterministic_algorithms_warn_only
function_mode_depth: Callable[[], int] = torch._C._len_torch_function_stack
dynamo_callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # type: ignore[attr-defined]
BatchNorm: type = torch.nn.modules.batchnorm._NormBase  # the base of all that keep running statistics


def keep_graph() -> bool:
    """Whether the running backward was asked to retain its graph (only valid inside a backward)."""
    return _autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def top_saved_tensors_hooks() -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """The innermost ``saved_tensors_hooks`` pair that a tensor saved now would go through."""
    return _autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]


def queue_callback(callback: Callable[[], None]) -> None:
    """Run ``callback`` when the running backward ends (public as ``autograd.graph`` from 2.15)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def reentrant_backward_allowed() -> bool:
    """False inside ``autograd.grad`` or ``backward(inputs=...)``, where a reentrant region is wrong."""
    return torch.autograd._is_checkpoint_valid()


def current_node() -> Any:
    """The autograd node whose backward is running on this thread, or None."""
    return torch._C._current_autograd_node()


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What identifies the memory of a tensor while it lives (equal for all its views), and its bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


node_number: Callable[[], int] = torch.autograd._get_sequence_nr
"""The number that the next autograd node made on this thread will have."""


def nodes_since(number: int, tensors: Iterable[torch.Tensor]) -> Iterator[Any]:
    """The autograd nodes behind ``tensors`` that were made since :func:`node_number` said ``number``, leaves apart."""
    waiting = [t.grad_fn for t in tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and number <= node._sequence_nr() < _LEAF:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions]


_LEAF = (1 << 64) - 1  # the number of every node that accumulates into a leaf


def tls_get(key: str) -> Any:
    """An object stored under ``key`` in the thread state that autograd copies to its device threads."""
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def tls_set(key: str, value: object) -> None:
    """Store ``value`` in the thread state that autograd copies to its device threads."""
    if _tls_steals_a_reference():
        _take_reference(value)
    torch._C._stash_obj_in_tls(key, value)


def _take_reference(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


@functools.cache
def _tls_steals_a_reference() -> bool:
    """Torch 2.9 releases on replacement a reference that it never took; later versions take it."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("distckpt.probe", probe)
    steals = sys.getrefcount(probe) == before
    if steals:
        _take_reference(probe)
    return steals


def skip_frame(function: Callable[..., Any]) -> None:
    """Ask Dynamo not to compile ``function``'s own frame (it may still be inlined into a caller's).

    Without this a graph break at the call makes Dynamo trace the frame again as a root, where it
    would see ``is_dynamo_compiling()`` and hand an eager call to torch's engine.
    """
    _skip(function.__code__)


def skip_frames_below(function: Callable[..., Any]) -> None:
    """Ask Dynamo to compile neither ``function``'s own frame nor any below it: ``disable`` without its wrapper."""
    _skip(function.__code__, below=True)


def skip_inner_frames(function: Callable[..., Any]) -> None:
    """Ask Dynamo not to compile the functions that ``function`` defines, each time it runs, and hands to torch."""
    for inner in function.__code__.co_consts:
        if isinstance(inner, CodeType):
            _skip(inner)


def _skip(code: CodeType, below: bool = False) -> None:
    frames: Any = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
    skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip if below else default))  # type: ignore[attr-defined]


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# Not functools.cache: Dynamo, which sees this call after a graph break, warns about that one.
_disabled: list[Callable[..., Any]] = []


def _disabled_call() -> Callable[..., Any]:
    if not _disabled:
        from torch._dynamo import (
            disable,
        )  # takes a second to import, so only when a compiled caller is running

        _disabled.append(disable(_call))
    return _disabled[0]


def call_without_dynamo(function: object, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` with Dynamo off for every frame below it.

    One disabled function for all: each one that Dynamo makes is a reference cycle that would hold its
    function's arguments (pytorch#154642).
    """
    return _disabled_call()(function, *args, **kwargs)


def opaque_to_dynamo(function: Any) -> Any:
    """Decorator, free at run time: Dynamo neither traces ``function`` into a graph nor compiles its frame."""
    function._torchdynamo_disable = True
    skip_frame(function)
    return function


def torch_operator(
    function: object, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Torch's own checkpoint call. Only reached while Dynamo traces, which swaps it for its operator."""
    return torch.utils.checkpoint.checkpoint(function, *args, **options, **kwargs)  # type: ignore[attr-defined]


_infra_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
_traces_non_strictly: Callable[[], bool] = getattr(torch.compiler, "_is_non_strict_tracing", lambda: False)


def is_proxy_tracing() -> bool:
    """Whether AOTAutograd or export is tracing on this thread."""
    return _infra_mode(_PROXY) is not None and not _traces_non_strictly()


def dispatch_mode_is_on() -> bool:
    """Whether any dispatch mode is on, which autograd takes for tensor subclasses being about."""
    return torch._C._len_torch_dispatch_stack() > 0


_dispatch_modes: Any = importlib.import_module("torch.utils._python_dispatch")
top_dispatch_mode: Callable[[], Any] = _dispatch_modes._get_current_dispatch_mode
"""The innermost dispatch mode of this thread, or None."""


def traced_graph() -> Any:
    """The ``torch.fx`` graph that AOTAutograd or export is tracing on this thread, or None."""
    if not is_proxy_tracing():
        return None
    mode: Any = _infra_mode(_PROXY)
    return mode.tracer.graph


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Run our own bookkeeping ops where no user dispatch mode sees them."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def device_context() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)`` (or default device), or None."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            return mode.device  # type: ignore[attr-defined]
    return None


_IN_PLACE_OR_VIEW = torch._C.DispatchKey.ADInplaceOrView
_key_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude_key = torch._C._dispatch_tls_set_dispatch_key_excluded


def detach_below_autograd(x: torch.Tensor) -> torch.Tensor:
    """An alias of ``x`` without history that shares its version counter, also from inside a dispatch mode.

    A mode runs below the ADInplaceOrView key, which is what ties the counters of a view and its base together.
    """
    if not _key_is_excluded(_IN_PLACE_OR_VIEW):
        return x.detach()
    _exclude_key(_IN_PLACE_OR_VIEW, False)
    try:
        return x.detach()
    finally:
        _exclude_key(_IN_PLACE_OR_VIEW, True)


def preserve_versions(tensors: tuple[torch.Tensor, ...]) -> contextlib.AbstractContextManager[Any]:
    """Write into ``tensors`` without moving their version counters."""
    return torch.autograd._unsafe_preserve_version_counter(tensors)


@contextlib.contextmanager
def autocast_nesting():
    """Count one autocast level, and drop the cached weight casts when the outermost level ends."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def sdp_readers() -> tuple[Callable[[], Any], ...]:
    """Readers of the attention state: flash, memory efficient, math and cuDNN allowed, and the order they are tried."""
    c = torch._C
    return (
        c._get_flash_sdp_enabled,
        c._get_mem_efficient_sdp_enabled,
        c._get_math_sdp_enabled,
        c._get_cudnn_sdp_enabled,
        c._get_sdp_priority_order,
    )


def set_sdp_state(state: tuple[bool, ...]) -> None:
    """Allow attention kernels: flash, memory efficient, math, cuDNN."""
    c = torch._C
    c._set_sdp_use_flash(state[0])
    c._set_sdp_use_mem_efficient(state[1])
    c._set_sdp_use_math(state[2])
    c._set_sdp_use_cudnn(state[3])


def set_sdp_priority(order: list[int]) -> None:
    """Choose the order in which attention kernels are tried."""
    torch._C._set_sdp_priority_order(order)


def activation_wrappers() -> Any:
    """Torch's module with ``ActivationWrapper``, ``CheckpointWrapper`` and their kin, none of which is the engine.

    FSDP and ``torch.distributed.checkpoint`` recognise these classes and the prefix they put into names.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    NAMES.need("torch's module wrappers")
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    return checkpoint_wrapper


def composable_contract() -> Any:
    """Torch's registry of composable APIs: a module with ``contract``, ``_State`` and ``_get_registry``.

    Raises:
        ImportError: torch was built without ``torch.distributed``.
    """
    NAMES.need("torch's module wrappers")
    return importlib.import_module(
        "torch.distributed._composable.contract"
    )  # the package has a function of that name


def composable_checkpoint() -> Any:
    """Torch's composable ``checkpoint``, or None where torch was built without ``torch.distributed``."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed._composable import checkpoint

    return checkpoint


def checkpointed_by(module: torch.nn.Module) -> str | None:
    """The API of torch's that already makes calls of ``module`` checkpointed, or None."""
    if not torch.distributed.is_available():
        return None
    if isinstance(module, activation_wrappers().CheckpointWrapper):
        return "checkpoint_wrapper"
    if "checkpoint" in (composable_contract()._get_registry(module) or ()):
        return "torch.distributed._composable.checkpoint"
    return None


def user_saved_tensors_hooks(
    is_ours: Callable[[Any], bool],
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """The innermost hook pair that is not the engine's own, found by lifting ours off the stack for a moment."""
    lifted = []
    try:
        while (top := top_saved_tensors_hooks()) is not None and is_ours(top):
            pop_saved_tensors_hooks()
            lifted.append(top)
        return top
    finally:
        for pair in reversed(lifted):
            push_saved_tensors_hooks(*pair)


def is_aot_tracing() -> bool:
    """Whether AOTAutograd or export is tracing, also while it only propagates fake tensors."""
    return _guards.TracingContext.try_get() is not None or is_proxy_tracing()


def is_compiled_region(func: object) -> bool:
    """Whether ``func`` is the one operator of all inductor-compiled calls, see :func:`compiled_region_key`."""
    try:
        from torch._higher_order_ops.wrap import _resolve_inductor_callable, inductor_compiled_code
    except ImportError:  # before 2.11 such calls never reach a dispatch mode
        return False
    del _resolve_inductor_callable
    return func is inductor_compiled_code


def compiled_region_key(func: object, args: tuple[Any, ...]) -> Any:
    """A key for an inductor-compiled call, one per compiled region (pytorch#175258)."""
    from torch._higher_order_ops.wrap import _resolve_inductor_callable

    return (func, _resolve_inductor_callable(args[0]).idx) if args else func


def open_node(value: object) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The children of a container that torch's pytree knows and what makes it again of others, or None for a leaf."""
    node = _pytree.SUPPORTED_NODES.get(_pytree._get_node_type(value))
    if node is None:
        return None
    children, context = node.flatten_fn(value)
    return list(children), lambda parts: node.unflatten_fn(parts, context)


def wait_for_collective(x: torch.Tensor) -> None:
    """Wait until a functional collective has filled ``x``."""
    torch.ops._c10d_functional.wait_tensor(x)


def has_ordered_effect(op: object) -> bool:
    """Whether an operator has an ordered side effect, so that running it twice is not harmless (c10d excepted)."""
    has_effects: Any
    try:
        from torch._higher_order_ops.effects import has_effects
    except ImportError:
        return False
    try:
        found = has_effects(op)
    except TypeError:  # up to 2.9 it asks for the arguments too
        found = has_effects(op, (), {})
    return found and getattr(op, "namespace", "") != "c10d"


# Torch runs a scripted function in another way the first time than from the second time on, unless it is told not to.
script_optimizes: Callable[[], bool] = torch._C._get_graph_executor_optimize
set_script_optimizes: Callable[[bool], None] = torch._C._set_graph_executor_optimize
last_script: Callable[[], Any] = torch._C._last_executed_optimized_graph
"""The TorchScript graph that this thread ran last; None when it never ran one."""


# Torch 2.14 and later keep on each thread whether torch.fx is tracing, which Dynamo asks; before, it is a global.
_fx: Any = importlib.import_module("torch.fx._symbolic_trace")
fx_tracing: Callable[[], bool] = getattr(_fx, "_get_is_fx_tracing", lambda: False)
set_fx_tracing: Callable[[bool], None] = getattr(_fx, "_set_is_fx_tracing", lambda value: None)
