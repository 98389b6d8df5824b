"""The composable form: torch's ``torch.distributed._composable.checkpoint`` over our engine.

In place, with no wrapper and no new names. The module is entered in torch's registry of composable APIs under the
name torch's own has, so ``fully_shard``, ``replicate`` and a second application see it.
"""

from __future__ import annotations

from typing import Any

import torch

from distckpt import _torch
from distckpt.engine.options import Options
from distckpt.modules.forward import ModuleRegion

_contract = _torch.composable_contract()


class CheckpointState(_contract._State):
    """What ``checkpoint.state(module)`` gives. The fields are torch's; ``_ac_generator`` is always None here."""

    enable_hook: bool = False
    _ac_generator: None = None


@_contract.contract(CheckpointState)
def checkpoint(module: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
    """Make every call of ``module`` a region, in place, and return the module.

    Args:
        **kwargs: ``preserve_rng_state``, ``context_fn``, ``determinism_check``, ``debug``, ``early_stop`` and
            ``respect_saved_tensors_hooks`` as for ``distckpt.compat.checkpoint``.

    Raises:
        NotImplementedError: ``use_reentrant=True``.
        ValueError: any other keyword.
        AssertionError: the module has been through this before.
    """
    if kwargs.pop("use_reentrant", False):
        raise NotImplementedError(
            "use_reentrant=True is not supported in composable checkpoint. "
            "Please use torch.utils.checkpoint.checkpoint instead."
        )
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    if kwargs:
        raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))
    ModuleRegion(module, Options(strict=False, **options)).attach()
    checkpoint.state(module).enable_hook = True
    return module


_OPTIONS = (
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
    "respect_saved_tensors_hooks",
)

composable_checkpoint = checkpoint
