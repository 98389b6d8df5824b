"""The public names; ``distckpt`` itself is these, loaded when the first of them is asked for."""

from distckpt import compat as compat
from distckpt import devices as devices
from distckpt import rng as rng
from distckpt.engine import Session as Session
from distckpt.engine import checkpoint as checkpoint
from distckpt.engine import checkpoint_sequential as checkpoint_sequential
from distckpt.engine import is_recomputing as is_recomputing
from distckpt.engine import pin as pin
from distckpt.engine import session as session
from distckpt.engine.devices import DefaultDeviceType as DefaultDeviceType
from distckpt.engine.switches import set_checkpoint_debug_enabled as set_checkpoint_debug_enabled
from distckpt.engine.switches import set_checkpoint_early_stop as set_checkpoint_early_stop
from distckpt.errors import CheckpointError as CheckpointError
from distckpt.errors import DistckptError as DistckptError
from distckpt.modules import Applied as Applied
from distckpt.modules import apply as apply
from distckpt.policy import CheckpointPolicy as CheckpointPolicy
from distckpt.policy import SelectiveCheckpointContext as SelectiveCheckpointContext
from distckpt.policy import create_selective_checkpoint_contexts as create_selective_checkpoint_contexts
