"""Every public name of ``torch.utils.checkpoint`` (torch 2.15), over our engine, with torch's behaviour; names only."""

from distckpt._torch import noop_context_fn
from distckpt.compat import wrapper
from distckpt.compat.checkpoint import checkpoint, checkpoint_sequential, get_device_states, set_device_states
from distckpt.compat.install import install
from distckpt.compat.wrapper import composable_checkpoint
from distckpt.engine.reentrant import CheckpointFunction, check_backward_validity, detach_variable
from distckpt.engine.region import set_checkpoint_debug_enabled, set_checkpoint_early_stop
from distckpt.engine.rng import DefaultDeviceType
from distckpt.engine.sessions import GraphExecGroup
from distckpt.errors import CheckpointError
from distckpt.policy.operators import CheckpointPolicy, SelectiveCheckpointContext
from distckpt.policy.sac import SAC_IGNORED_OPS
from distckpt.policy.sac import (
    create_selective_checkpoint_contexts as create_selective_checkpoint_contexts,
)

__all__ = [
    "SAC_IGNORED_OPS",
    "CheckpointError",
    "CheckpointFunction",
    "CheckpointPolicy",
    "DefaultDeviceType",
    "GraphExecGroup",
    "SelectiveCheckpointContext",
    "check_backward_validity",
    "checkpoint",
    "checkpoint_sequential",
    "composable_checkpoint",
    "create_selective_checkpoint_contexts",
    "detach_variable",
    "get_device_states",
    "install",
    "noop_context_fn",
    "set_checkpoint_debug_enabled",
    "set_checkpoint_early_stop",
    "set_device_states",
    "wrapper",
]
