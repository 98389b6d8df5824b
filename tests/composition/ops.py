"""What each step of a program computes, on values of shape (4, 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import distckpt as dc

Op = Callable[[torch.Tensor], torch.Tensor]


def _narrow(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[2:], x[:2]])


def _chunk(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([second, first], dim=1)


UNARY: dict[str, Op] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": torch.relu,
    "softmax": lambda x: x.softmax(-1),
    "square": lambda x: x * x,
    "halve": lambda x: x * 0.5,
    "exp": lambda x: x.tanh().exp(),
    "detach": lambda x: x.detach(),
    "pin": dc.pin,
}

BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: a * b.tanh(),
    "mm": lambda a, b: a.tanh() @ b.tanh().to(a.dtype),
    "where": lambda a, b: torch.where(a > b, a, b),
    # another path for one tensor given twice, as attention layers take
    "same": lambda a, b: (a * 0.75).sin() if a is b else a.cos() + b.tanh(),
}


def _reseed(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    return (x * torch.rand_like(x)).sin()


def _fork(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        return (x * torch.rand_like(x)).sin()


def _put_back(x: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    x = (x * torch.rand_like(x)).sin() + torch.rand_like(x)
    torch.set_rng_state(state)
    return x


DRAW: dict[str, Op] = {
    "reseed": _reseed,
    "fork": _fork,
    "put back": _put_back,
    "dropout": lambda x: F.dropout(x, 0.5),
    "noise": lambda x: x + torch.rand_like(x),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.4, training=True),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().float().sigmoid()).to(x.dtype),
}

SCRIPT = """
def run(x):
    y = x.sin() * x.sigmoid()
    return y.tanh() * x
"""


def _unsafe_of(x: torch.Tensor, op: str, weight: torch.Tensor) -> torch.Tensor:
    if op == "matmul":
        return x.expand(2, 4, 4) @ weight  # a product of matrices, then an unsafe view of it
    x = x.mm(weight)
    if op == "view":
        return torch.ops.aten._unsafe_view.default(x, [2, 8])
    return (torch.unsafe_chunk(x, 2) if op == "chunk" else torch.unsafe_split(x, 2))[0]


def unsafe(x: torch.Tensor, op: str, weight: torch.Tensor) -> torch.Tensor:
    """Use a product through an unsafe view, then change it in place; autograd saves nothing that changes."""
    y = _unsafe_of(x.tanh(), op, weight)
    used = (y * 2.0).sin().sum()
    y.add_(1.0)
    return x * used + y.sum()


def caught(x: torch.Tensor, op: str) -> torch.Tensor:
    """Try something that fails, and go on without it."""
    try:
        if op == "mm":
            return torch.mm(x, x[:3])
        if op == "view":
            return x.view(3, 5)
        if op == "index":
            return x[9]
        return x.sin().mm(x.cos()).mm(x[:2])
    except (RuntimeError, IndexError):
        return x.cos()


VIEW: dict[str, Op] = {
    "t": lambda x: x.t(),
    "view": lambda x: x.reshape(2, 8).view(4, 4),
    "narrow": _narrow,
    "expand": lambda x: x[0].expand(4, 4),
    "chunk": _chunk,
    "select": lambda x: x.unsqueeze(0).expand(2, 4, 4)[1],
    "flip": lambda x: x.t().flip(0),
}

IN_PLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda x: x.mul_(0.5),
    "add_": lambda x: x.add_(0.25),
    "relu_": lambda x: x.relu_(),
    "tanh_": lambda x: x.tanh_(),
    "copy_": lambda x: x[0].copy_(x.detach()[1].clone()),
    "dropout_": lambda x: F.dropout(x, 0.5, inplace=True),
    "row_": lambda x: x[1].mul_(2.0),
}


class Twice(torch.autograd.Function):
    """``sin`` with a backward that reads its saved tensors once, or twice as some third-party kernels do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, reads: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.reads = reads
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        if ctx.reads == 2:
            (x,) = ctx.saved_tensors
        return grads[0] * x.cos(), None
