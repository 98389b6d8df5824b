"""What a training step holds in memory, counted, not sampled: a measured step beside the training."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from launch.trainer import Trainer


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensor storages, after every op.

    A storage counts once however many views it has, from the op that first shows it until it dies, at the
    size it has at that moment: FSDP grows and empties its buffers in place. Not seen: what a kernel
    allocates and frees within one op. Sizes are as asked for, so two runs give the same number.
    """

    def __init__(self, *owned: object) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0
        self._see(owned)

    def now(self) -> int:
        """Bytes alive at this moment."""
        total = 0
        for ref in list(self._storages.values()):
            storage = ref()
            total += 0 if storage is None else storage.nbytes()
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see((args, kwargs, out))
        self.peak = max(self.peak, self.now())
        return out

    def _see(self, things: object) -> None:
        for thing in tree_iter(things):
            if isinstance(thing, torch.Tensor):
                self._add(thing)

    def _add(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # a DTensor, say: what it wraps is what takes memory
            for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                self._see(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _, key=key: self._storages.pop(key, None))


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step on this rank."""

    peak: int  # parameters, gradients, optimizer state and activations, at the fullest moment
    kept: int  # held between forward and backward for backward's sake
    runs: int  # executions of block bodies in the step
    early: int  # of them, replays before their gradient was there


def memory(trainer: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> Memory:
    """Measure one forward and backward of `trainer` on a batch; its weights and random numbers do not move.

    What is kept for backward is what lives when a backward begins, less what lives after a forward without
    gradients (so the parameters that FSDP leaves gathered do not count) or, where a forward has no life of its own, at
    the start of the step. Collective: every rank calls it.
    """
    layout, rng = trainer.layout, trainer.rng
    state = [trainer.model.state_dict(), trainer.optimizer.state_dict()]
    trainer.optimizer.zero_grad()
    with trainer.own_rng(), LiveBytes(state, inputs, targets) as live, torch.no_grad():
        loss = layout.forward(inputs, targets)
        without = live.now()
    del loss
    trainer.rng = rng
    runs, kept = layout.block_runs(), 0

    def before_backward() -> None:
        nonlocal kept
        kept = max(kept, live.now() - without)

    with trainer.own_rng(), LiveBytes(state, inputs, targets) as live:
        layout.step(inputs, targets, before_backward)
    trainer.optimizer.zero_grad()
    trainer.rng = rng
    return Memory(peak=live.peak, kept=kept, runs=layout.block_runs() - runs, early=layout.replayed_early())
