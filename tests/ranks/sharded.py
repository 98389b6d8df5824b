"""A model whose units can be told apart by size, its steps, and what a step leaves behind on a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt as dc
from distckpt._torch_dist import fsdp_state, parameter_groups
from distckpt.engine.stats import counters
from tests.ranks.collectives import Collectives

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.up(x).sin())


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(hidden)
        self.gain = nn.Parameter(torch.ones(hidden))
        self.mlp = nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + self.mlp((self.attn(self.norm(x)) * self.gain * scale).cos())


class Stack(nn.Module):
    """Blocks of growing size; ``regions`` is how many blocks one ``dc.checkpoint`` call in the forward takes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8 * (index + 1)) for index in range(count))
        self.regions = 0

    def run(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for layer in self.layers[first:last]:
            x = layer(x, scale=1.5)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.regions or len(self.layers)
        for first in range(0, len(self.layers), size):
            if self.regions:
                x = dc.checkpoint(self.run, x, first, first + size)
            else:
                x = self.run(x, first, first + size)
        return x


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.stack = Stack(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stack(self.embed(x))
        return self.head(self.norm(x.to(self.norm.weight.dtype)))


FLAT = ("stack.layers.*",)
NESTED = ("stack.layers.*.attn", "stack.layers.*.mlp", "stack.layers.*")


def named(model: nn.Module, globs: Iterable[str | tuple[str, ...]]) -> list[Any]:
    """The modules that the globs mean; those of a tuple together."""
    from distckpt.modules import choose

    chosen: list[Any] = []
    for glob in globs:
        modules = [module for _, module in choose(model, glob)]
        chosen += modules if isinstance(glob, str) else [modules]
    return chosen


def by_hand(model: nn.Module, units: Iterable[str | tuple[str, ...]], **options: Any) -> None:
    """Plain FSDP2, as torch's own documentation does it; ``units`` from the inside out."""
    for unit in named(model, units):
        fully_shard(unit, **options)
    fully_shard(model, **options)


@dataclass
class Step:
    """Two optimizer steps of one way to shard."""

    values: list[torch.Tensor] = field(default_factory=list)
    calls: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)  # phase, and what it sent
    replays: int = 0
    left: list[str] = field(default_factory=list)  # units that a backward did not put back


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part: when every rank's parts are equal, so are the wholes."""
    return x.to_local() if isinstance(x, DTensor) else x


def unfinished(model: nn.Module) -> list[str]:
    """The units that are not as they are before a forward: sharded, idle, nothing under way."""
    found = []
    for name, module in model.named_modules():
        state = fsdp_state(module)
        if state is None:
            continue
        idle = state._training_state.name == "IDLE" and state._state_ctx.iter_forward_root is None
        for group in parameter_groups(state):
            idle &= group.is_sharded and group._all_gather_result is None
            idle &= group._training_state.name == "IDLE" and not group._post_forward_indices
        if not idle:
            found.append(name)
    return found


def one_forward(model: Any, phase: Callable[[str], None], x: torch.Tensor) -> None:
    phase("forward")
    loss = model(x).float().square().mean()
    torch.manual_seed(99)  # a replay that leaned on the current random state would show
    phase("backward")
    loss.backward()


def two_forwards(model: Any, phase: Callable[[str], None], x: torch.Tensor) -> None:
    """One backward over two forwards of the same units."""
    phase("forward")
    loss = model(x).float().square().mean() + model(x + 1).float().square().mean()
    torch.manual_seed(99)
    phase("backward")
    loss.backward()


def accumulate(model: Any, phase: Callable[[str], None], x: torch.Tensor) -> None:
    """Two micro-batches, the first of which sends no gradients."""
    for index in range(2):
        model.set_requires_gradient_sync(index == 1)
        model.set_is_last_backward(index == 1)
        one_forward(model, phase, x + index)


def train(model: Any, step: Callable[..., None] = one_forward, *, left: bool = True) -> Step:
    """Two optimizer steps of ``model``; ``left`` looks at its FSDP2 units after each."""
    done, replays = Step(), counters.replays
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=False)
    communication = Collectives()

    def phase(name: str) -> None:
        communication.calls = []
        done.calls.append((name, communication.calls))

    for index in range(2):
        torch.manual_seed(10 * index + dist.get_rank())
        with communication:
            step(model, phase, torch.randn(4, WIDTH))
        done.left += unfinished(model) if left else []
        done.values += [local(p.grad.detach()).clone() for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    done.values += [local(p.detach()).clone() for p in model.parameters()]
    done.replays = counters.replays - replays
    return done


def compare(ours: Step, plain: Step) -> dict[str, Any]:
    """What a test wants to know, as JSON."""
    equal = len(ours.values) == len(plain.values) and all(
        torch.equal(a, b) for a, b in zip(ours.values, plain.values, strict=True)
    )
    return {
        "equal": equal,
        "finite": all(bool(value.isfinite().all()) for value in ours.values),
        "same order": ours.calls == plain.calls,
        "same calls": [(p, sorted(c)) for p, c in ours.calls] == [(p, sorted(c)) for p, c in plain.calls],
        "calls": ours.calls,
        "plain calls": plain.calls,
        "replays": ours.replays,
        "left": ours.left,
    }
