"""The three ways the job can run a block: keep everything, torch's checkpoint, distckpt's."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from launch.model import Region, plain

MODES = ("none", "torch", "distckpt")


def region(mode: str) -> Region:
    """The function that runs a block's body in `mode`, one of MODES."""
    if mode == "none":
        return plain
    if mode == "torch":
        return partial(torch_checkpoint, use_reentrant=False)
    import distckpt

    return distckpt.checkpoint
