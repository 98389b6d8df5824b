"""Every public name of ``torch.utils.checkpoint`` (torch 2.15), over our engine, with torch's behaviour."""

from distckpt._torch import noop_context_fn as noop_context_fn
from distckpt.compat.checkpoint import checkpoint as checkpoint
from distckpt.compat.checkpoint import checkpoint_sequential as checkpoint_sequential
from distckpt.compat.device_states import get_device_states as get_device_states
from distckpt.compat.device_states import set_device_states as set_device_states
from distckpt.engine.devices import DefaultDeviceType as DefaultDeviceType
from distckpt.engine.errors import CheckpointError as CheckpointError
from distckpt.engine.reentrant import CheckpointFunction as CheckpointFunction
from distckpt.engine.reentrant import check_backward_validity as check_backward_validity
from distckpt.engine.reentrant import detach_variable as detach_variable
from distckpt.engine.sessions import GraphExecGroup as GraphExecGroup
from distckpt.engine.switches import set_checkpoint_debug_enabled as set_checkpoint_debug_enabled
from distckpt.engine.switches import set_checkpoint_early_stop as set_checkpoint_early_stop
from distckpt.policy.selective import SAC_IGNORED_OPS as SAC_IGNORED_OPS
from distckpt.policy.selective import CheckpointPolicy as CheckpointPolicy
from distckpt.policy.selective import SelectiveCheckpointContext as SelectiveCheckpointContext
from distckpt.policy.selective import (
    create_selective_checkpoint_contexts as create_selective_checkpoint_contexts,
)

# Last: they build on the names above.
from distckpt.compat import wrapper as wrapper  # noqa: E402
from distckpt.compat.composable import checkpoint as composable_checkpoint  # noqa: E402
from distckpt.compat.install import install as install  # noqa: E402
