"""Checkpoint and offload wrappers: torch's module wrappers over our engine.

Subclasses of torch's own, so everything that looks for those (FSDP, ``torch.distributed.checkpoint``, Lightning)
and for the prefix ``_checkpoint_wrapped_module`` treats ours the same. ``dc.apply`` is the way without a wrapper:
it keeps classes and dotted names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distckpt import _torch
from distckpt.compat.checkpoint import checkpoint

_torchs = _torch.activation_wrappers()

ActivationWrapper: Any = _torchs.ActivationWrapper
CheckpointImpl: Any = _torchs.CheckpointImpl
OffloadWrapper: Any = _torchs.OffloadWrapper
offload_wrapper: Callable[[torch.nn.Module], torch.nn.Module] = _torchs.offload_wrapper


class CheckpointWrapper(_torchs.CheckpointWrapper):
    """A module whose calls are regions of our engine, around another module.

    Args:
        mod: the module to wrap; it becomes ``_checkpoint_wrapped_module``.
        checkpoint_impl: which ``use_reentrant`` the default ``checkpoint_fn`` gets.
        checkpoint_fn: called with the module and the call's arguments, instead of ``distckpt.compat.checkpoint``.
        **checkpoint_fn_kwargs: options passed on with every call.
    """

    def __init__(
        self,
        mod: torch.nn.Module,
        checkpoint_impl: Any = CheckpointImpl.NO_REENTRANT,
        checkpoint_fn: Callable[..., Any] | None = None,
        **checkpoint_fn_kwargs: Any,
    ) -> None:
        if checkpoint_fn is None:
            reentrant = checkpoint_impl == CheckpointImpl.REENTRANT
            super().__init__(
                mod, checkpoint_impl, checkpoint, use_reentrant=reentrant, **checkpoint_fn_kwargs
            )
        else:
            super().__init__(mod, checkpoint_impl, checkpoint_fn, **checkpoint_fn_kwargs)


def checkpoint_wrapper(
    module: torch.nn.Module,
    checkpoint_impl: Any = CheckpointImpl.NO_REENTRANT,
    checkpoint_fn: Callable[..., Any] | None = None,
    **checkpoint_fn_kwargs: Any,
) -> torch.nn.Module:
    """``module`` in a :class:`CheckpointWrapper`. Names in ``named_parameters`` and ``state_dict`` stay."""
    return CheckpointWrapper(module, checkpoint_impl, checkpoint_fn, **checkpoint_fn_kwargs)


def apply_activation_checkpointing(
    model: torch.nn.Module,
    checkpoint_wrapper_fn: Callable[..., torch.nn.Module] = checkpoint_wrapper,
    check_fn: Callable[[torch.nn.Module], bool] = lambda _: True,
    auto_wrap_policy: Callable[[torch.nn.Module, bool, int], bool] | None = None,
) -> None:
    """Replace submodules of ``model``, never ``model`` itself, by ``checkpoint_wrapper_fn`` of them.

    Args:
        check_fn: which submodules; by default all of them.
        auto_wrap_policy: an FSDP wrapping policy; when given it decides, and not ``check_fn``.
    """
    _torchs.apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=checkpoint_wrapper_fn,
        check_fn=check_fn,
        auto_wrap_policy=auto_wrap_policy,
    )
