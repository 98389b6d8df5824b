"""distckpt: recompute activations instead of storing them, exactly, on one device or on every rank."""

from distckpt.engine import CheckpointError as CheckpointError
from distckpt.engine import checkpoint as checkpoint
from distckpt.engine import checkpoint_sequential as checkpoint_sequential
from distckpt.engine import is_recomputing as is_recomputing
from distckpt.engine import pin as pin
from distckpt.engine import session as session

__version__ = "0.1.0"
