"""Policies: what a region saves and what it recomputes. Torch-shaped selective contexts; data policies come later."""

from distckpt.policy.selective import SAC_IGNORED_OPS as SAC_IGNORED_OPS
from distckpt.policy.selective import CheckpointPolicy as CheckpointPolicy
from distckpt.policy.selective import SelectiveCheckpointContext as SelectiveCheckpointContext
from distckpt.policy.selective import (
    create_selective_checkpoint_contexts as create_selective_checkpoint_contexts,
)
