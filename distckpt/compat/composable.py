"""The composable form: torch's ``torch.distributed._composable.checkpoint`` over our engine.

In place, with no wrapper and no new names. The module is entered in torch's registry of composable APIs under the
name torch's own has, so ``fully_shard``, ``replicate`` and a second application see it.
"""

from __future__ import annotations

from typing import Any

import torch

from distckpt import _torch
from distckpt.compat.checkpoint import region_options
from distckpt.modules.forward import ModuleRegion

_contract = _torch.composable_contract()


class CheckpointState(_contract._State):
    """What ``checkpoint.state(module)`` gives. The fields are torch's; ``_ac_generator`` is always None here."""

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
    checkpoint.state(module).enable_hook = True
    return module


# Torch's registry has the API under the name of the bare function, and keeps that function as a key in the module.
# So it is called as torch's, and pickles under the name that it really has here.
_checkpoint.__name__ = "checkpoint"
checkpoint: Any = _contract.contract(CheckpointState)(_checkpoint)
checkpoint.__qualname__ = "checkpoint"
composable_checkpoint = checkpoint
