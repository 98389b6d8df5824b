"""Policies: what a region saves and what it recomputes. Short, as data policies come later."""

from distckpt.policy.operators import CheckpointPolicy as CheckpointPolicy
from distckpt.policy.operators import SelectiveCheckpointContext as SelectiveCheckpointContext
from distckpt.policy.sac import SAC_IGNORED_OPS as SAC_IGNORED_OPS
from distckpt.policy.sac import create_selective_checkpoint_contexts as create_selective_checkpoint_contexts
