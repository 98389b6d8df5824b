"""Modules the torch way, over our engine: checkpoint and offload wrappers, and the composable form.

The wrappers are subclasses of torch's own, so everything that looks for those (FSDP, ``torch.distributed.checkpoint``,
Lightning) and for the prefix ``_checkpoint_wrapped_module`` treats ours the same. The composable form works in place,
with no wrapper and no new names: the module is entered in torch's registry of composable APIs under the name torch's
own has, so ``fully_shard``, ``replicate`` and a second application see it. ``dc.apply`` is the way of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distckpt import _torch
from distckpt.compat.checkpoint import checkpoint, region_options
from distckpt.modules.module_region import ModuleRegion

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


_contract = _torch.composable_contract()


class CheckpointState(_contract._State):
    """What ``composable_checkpoint.state(module)`` gives. Torch's fields; ``_ac_generator`` is always None here."""

    enable_hook: bool = False
    _ac_generator: None = None


def _checkpoint(module: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
    """Make every call of ``module`` a region, in place, and return the module.

    Args:
        **kwargs: ``preserve_rng_state``, ``context_fn``, ``determinism_check``, ``debug`` and ``early_stop`` as for
            ``distckpt.compat.checkpoint``.

    Raises:
        NotImplementedError: ``use_reentrant=True``.
        ValueError: any other keyword, or a value that none of these takes.
        AssertionError: the module has been through this before.
    """
    if kwargs.pop("use_reentrant", False):
        raise NotImplementedError(
            "use_reentrant=True is not supported in composable checkpoint. "
            "Please use torch.utils.checkpoint.checkpoint instead."
        )
    preserve_rng_state = kwargs.pop("preserve_rng_state", True)
    context_fn = kwargs.pop("context_fn", None)
    determinism_check = kwargs.pop("determinism_check", "default")
    debug = kwargs.pop("debug", False)
    early_stop = kwargs.pop("early_stop", True)
    if kwargs:
        raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))
    context_fn = _torch.noop_context_fn if context_fn is None else context_fn
    options = region_options(preserve_rng_state, context_fn, determinism_check, debug, early_stop)
    ModuleRegion(module, options).attach()
    composable_checkpoint.state(module).enable_hook = True
    return module


# Torch's registry has the API under the name of the bare function, and keeps that function as a key in the module.
# So it is called as torch's, and pickles under the name that it really has here.
_checkpoint.__name__ = "checkpoint"
composable_checkpoint: Any = _contract.contract(CheckpointState)(_checkpoint)
composable_checkpoint.__qualname__ = "composable_checkpoint"
