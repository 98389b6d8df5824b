"""The three ways the job can run its blocks: keep everything, torch's checkpoint, distckpt's."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from launch.model import Block

MODES = ("none", "torch", "distckpt")


def put(model: nn.Module, mode: str) -> None:
    """Make every block of ``model`` a region in ``mode``, one of MODES; before the model is sharded."""
    if mode == "torch":
        for block in model.modules():
            if isinstance(block, Block):
                block.region = partial(torch_checkpoint, use_reentrant=False)
    if mode == "distckpt":
        import distckpt as dc

        dc.apply(model, "blocks.*")
