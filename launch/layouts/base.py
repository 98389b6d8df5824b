"""Layout: what every way to spread a model over ranks has in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from launch.model import GPT, block_runs
from launch.options import Options
from launch.parallel import World


class Layout:
    """A model over the ranks.

    ``model`` is this rank's part. Ranks with the same ``data_rank`` (below ``replicas``) read the same text. Ranks with
    the same ``rng_rank`` drop the same units.
    """

    model: nn.Module
    data_rank: int = 0
    rng_rank: int = 0
    replicas: int = 1

    def __init__(self, options: Options, mode: str, world: World) -> None:
        raise NotImplementedError

    def step(
        self, inputs: torch.Tensor, targets: torch.Tensor, before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor | None:
        """Forward and backward over a batch, int64 (batch, context) both. ``before_backward`` is called whenever a
        backward is about to begin.

        Returns:
            The mean loss over the batch, a scalar; None on a rank that does not see the loss.
        """
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """The forward alone, or None where a forward has no life of its own."""
        return None

    def stages(self) -> nn.Module | dict[int, nn.Module]:
        """What the ranks compare before they train: the model, or this rank's pipeline stages by number."""
        return self.model

    def block_runs(self) -> int:
        """Executions of block bodies on this rank so far, replays included."""
        return block_runs(self.model)

    def replayed_early(self) -> int:
        """Blocks that the last step replayed on this rank before their gradient was there."""
        return 0


class WholeModel(Layout):
    """A layout whose every rank runs the whole model: one forward, then one backward."""

    def around(self) -> AbstractContextManager[object]:
        """What a forward and its backward run in."""
        return nullcontext()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self.around():
            return self.model(inputs, targets)

    def step(
        self, inputs: torch.Tensor, targets: torch.Tensor, before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor:
        with self.around():
            loss = self.model(inputs, targets)
            if before_backward is not None:
                before_backward()
            loss.backward()
        return loss.detach()


def build(options: Options) -> GPT:
    """The whole model on one rank, with the same parameters on every rank and in every mode."""
    torch.manual_seed(options.seed)
    return GPT(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        context=options.context,
        dropout=options.dropout,
    )


def precision(options: Options) -> MixedPrecisionPolicy:
    """bf16 gathers parameters and computes in bf16; gradients are reduced and kept in fp32."""
    if options.dtype == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
