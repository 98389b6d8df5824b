"""The three ways the job can run its blocks: keep everything, torch's checkpoint, distckpt's."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from launch.model import GPT

MODES = ("none", "torch", "distckpt")


def put(model: GPT, mode: str) -> GPT:
    """Make every block's body a region in `mode`, one of MODES; before the model is sharded. Returns the model."""
    if mode == "torch":
        for block in model.blocks:
            block.region = partial(torch_checkpoint, use_reentrant=False)  # type: ignore[assignment]
    if mode == "distckpt":
        import distckpt as dc

        dc.apply(model, "blocks.*")
    return model
