"""One model in training: its share of the parameters, optimizer, data stream and random numbers."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from launch.data import Batches
from launch.layouts import lay_out
from launch.options import Options
from launch.parallel import World, everyone, mean


class Trainer:
    """All that decides the next step, so that two trainers in one process do not disturb each other."""

    def __init__(self, options: Options, mode: str, text: torch.Tensor, world: World) -> None:
        self.mode = mode
        self.layout = lay_out(options, mode, world)
        self.model = self.layout.model
        world.coordinator.check(self.layout.stages())  # ranks that differ end here, all with the same error
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95))
        self.batches = Batches(
            text,
            batch=options.batch,
            context=options.context,
            seed=options.seed,
            rank=self.layout.data_rank,
        )
        # Every mode drops the same units; which ranks do, the layout says.
        self.rng = torch.Generator().manual_seed(options.seed * 1_000_003 + self.layout.rng_rank).get_state()
        self.losses: list[float] = []  # the mean over the ranks, one a step
        self._own = hashlib.sha256()  # of this rank's own losses, to the bit

    @contextmanager
    def own_rng(self) -> Iterator[None]:
        """Within: torch's default generator is this trainer's. After: it is what it was before."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.rng)
        try:
            yield
        finally:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(before)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """Forward, backward, update. Returns the loss on the ranks that see it. Call it within `own_rng()`."""
        self.optimizer.zero_grad()
        loss = self.layout.step(inputs, targets)
        self.optimizer.step()
        return loss

    def log(self, loss: torch.Tensor | None) -> float:
        """Note a step's loss; returns the mean over the ranks."""
        if loss is not None:
            self._own.update(raw(loss))
        self.losses.append(mean(loss))
        return self.losses[-1]

    def digest(self) -> dict[str, str]:
        """Short hashes over all ranks: "losses" of this run's steps, last "gradients" and "parameters"."""
        gradients, parameters = hashlib.sha256(), hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            for into, tensor in ((parameters, parameter), (gradients, parameter.grad)):
                into.update(name.encode())
                into.update(b"none" if tensor is None else raw(tensor))
        mine = {
            "losses": self._own.hexdigest(),
            "gradients": gradients.hexdigest(),
            "parameters": parameters.hexdigest(),
        }
        ranks = everyone(mine)
        return {
            name: hashlib.sha256("".join(rank[name] for rank in ranks).encode()).hexdigest()[:12]  # type: ignore[index]
            for name in mine
        }


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a CPU tensor, or of this rank's shard of one."""
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    local = local.contiguous()
    return ctypes.string_at(local.data_ptr(), local.numel() * local.element_size())
