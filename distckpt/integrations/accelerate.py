"""An FSDP plugin for accelerate: regions in the place of its own checkpointing. (Alone: it imports accelerate.)"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from distckpt.errors import BothSwitches
from distckpt.modules import apply, regions


@dataclasses.dataclass
class DistckptPlugin(FullyShardedDataParallelPlugin):
    """accelerate's FSDP plugin, with ``dc.apply`` on the model before ``Accelerator.prepare`` shards it.

    accelerate's own checkpointing runs with ``preserve_rng_state=False`` under FSDP2, so with dropout its gradients are
    wrong. This plugin takes its place: ``activation_checkpointing=True``, also from ``accelerate config`` or the
    environment, means ours, and so does leaving it out; an explicit False means none. FSDP1 and FSDP2. A model that has
    regions already keeps those.

    Args:
        globs: which modules, as for ``dc.apply``; None for the model's layers.
        options: options of ``dc.apply``.

    Raises:
        BothSwitches: ``activation_checkpointing_offload`` is on, which only accelerate's own checkpointing has (DC603).
        DistckptError: whatever ``dc.apply`` raises, in ``Accelerator.prepare``.
    """

    globs: str | Iterable[str] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    regions: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        self.regions = self.activation_checkpointing is not False
        if self.activation_checkpointing_offload is None:
            asked = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "false")
            self.activation_checkpointing_offload = asked.lower() in ("1", "true", "yes", "y", "t", "on")
        if self.activation_checkpointing_offload:
            raise BothSwitches(
                "activation_checkpointing_offload is on, and DistckptPlugin replaces accelerate's checkpointing",
                why="accelerate offloads what its own checkpoint wrapper keeps, which is not there",
                fix="set it to False (FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=false)",
            )
        self.activation_checkpointing = False  # accelerate's own never runs, whatever the environment says
        super().__post_init__()

    def set_auto_wrap_policy(self, model: torch.nn.Module) -> None:
        """accelerate calls this first in ``prepare``, and once more under FSDP2."""
        super().set_auto_wrap_policy(model)
        if self.regions and not len(regions(model)):
            apply(model, self.globs, **self.options)
