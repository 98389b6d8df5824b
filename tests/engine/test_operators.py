"""Operators and programs of many kinds: the gradient of each through a region is plain autograd's to the bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distckpt as dc

from .exact import Region, exact, leaf, plain


def init_inside(x: torch.Tensor) -> torch.Tensor:
    return nn.Linear(8, 8)(x).sin()


def slices_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y[2:4] = 0
    y.clamp_(min=-0.1)
    z = y.clone()
    z.add_(y)
    return z.exp()


def copied(x: torch.Tensor) -> torch.Tensor:
    h = torch.empty(8)
    h.copy_(x.sin())
    return h * h.exp()


def region_without_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = dc.checkpoint(lambda t: F.dropout(t.sin(), 0.5), x)
    return y * x.exp()


def grad_on_again(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.enable_grad():
        y = x.sin().exp()
    return y.cos()


def seed_inside(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    return F.dropout(x.sin(), 0.5) * x


def seeded_fork(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        x = F.dropout(x.sin(), 0.5) * x
    return F.dropout(x, 0.5).exp()


class RegionInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            a = x.detach().requires_grad_()
            b = dc.checkpoint(lambda t: t.sin().exp(), a)
        ctx.save_for_backward(a, b)
        return b.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        a, b = ctx.saved_tensors
        return torch.autograd.grad(b, a, grad)[0]


def gradient(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(fn(x).sum(), x, create_graph=True)[0]


PROGRAMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "initialisation": init_inside,
    "slices in place": slices_in_place,
    "copy_": copied,
    "region without grad mode": region_without_grad,
    "grad mode on again": grad_on_again,
    "seed": seed_inside,
    "seeded fork": seeded_fork,
    "region in a function's backward": lambda x: RegionInBackward.apply(x.sin()).cos(),
    "gradient of rrelu": lambda x: gradient(lambda t: F.rrelu(t.sin(), training=True), x).exp(),
    "rrelu of a gradient": lambda x: F.rrelu(
        gradient(lambda t: F.dropout(t.sin(), 0.4).exp(), x), training=True
    ),
    "two rrelus": lambda x: F.rrelu(F.rrelu(x, training=True) * 2, training=True) * 1,
    "rrelu in place": lambda x: F.rrelu_(x.sin(), training=True),
    "rrelu in a nested region": lambda x: dc.checkpoint(lambda t: F.rrelu(t, training=True), x.exp()),
    "sort and cumsum": lambda x: (x.sort().values.cumsum(0) * x).sin(),
    "max pool": lambda x: F.max_pool1d(x.view(1, 1, 8), 2).sin(),
    "embedding": lambda x: F.embedding(torch.tensor([0, 1]), x.view(4, 2)).exp().sin(),
    "cross entropy": lambda x: F.cross_entropy(x.view(2, 4), torch.tensor([1, 2])) * x.sum(),
    "gru": lambda x: nn.GRU(4, 4)(x.view(2, 1, 4))[0].sin(),
    "lstm": lambda x: nn.LSTM(4, 4, 2, dropout=0.5, bidirectional=True)(x.view(2, 1, 4))[0].sin(),
    "attention": lambda x: nn.MultiheadAttention(4, 2, dropout=0.3)(*[x.view(2, 1, 4)] * 3)[0],
    "gumbel": lambda x: F.gumbel_softmax(x.view(2, 4), hard=True).sin() * x.view(2, 4),
    "alpha dropout": lambda x: F.feature_alpha_dropout(x.view(1, 4, 2), 0.5).exp(),
    "multinomial": lambda x: x[torch.multinomial(x.detach().exp(), 4)].sin().exp(),
    "odd normals": lambda x: (x * torch.randn(1)).sin().exp() * torch.randn(3).sum(),
    "permutation": lambda x: x[torch.randperm(8)].sin().exp(),
    "pinned permutation": lambda x: x[dc.pin(torch.randperm(8))].sin().exp(),
    "svd": lambda x: torch.linalg.svd(x.view(4, 2)).S.sin(),
    "sequence of regions": lambda x: dc.checkpoint_sequential([torch.sin, torch.exp, torch.cos], 2, x),
    "selective region": lambda x: dc.checkpoint(
        lambda t: F.dropout(t.sin(), 0.4).exp(),
        x,
        context_fn=functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.sin.default]),
    ).cos(),
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_any_kind_is_exact(name: str, early_stop: bool) -> None:
    for check in ("none", "default", "bitwise"):

        def program(region: Region) -> Any:
            x = leaf(8)
            out = region(PROGRAMS[name], x)
            torch.rand(2)
            out.sum().backward()
            return x.grad, out

        exact(program, early_stop=early_stop, determinism_check=check)


@pytest.mark.parametrize("fired", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_any_kind_is_exact_in_a_session(name: str, fired: bool) -> None:
    def program(region: Region) -> Any:
        x = leaf(8)
        s = dc.session()
        with s:
            out = region(PROGRAMS[name], x)
        torch.rand(2)
        if fired:
            s.replay()
        out.sum().backward(retain_graph=name != "region in a function's backward")
        if name != "region in a function's backward":  # its inner graph is used up, in plain autograd too
            out.sum().backward()
        s.release()
        return x.grad, out

    exact(program)


@pytest.mark.parametrize("name", ["gradient of rrelu", "two rrelus", "rrelu in place", "seeded fork", "lstm"])
def test_a_program_of_any_kind_is_exact_on_torchs_surface(name: str) -> None:
    def program(region: Region) -> Any:
        ours = plain if region is plain else functools.partial(dc.compat.checkpoint, use_reentrant=False)
        x = leaf(8)
        out = ours(PROGRAMS[name], x)
        torch.rand(2)
        out.sum().backward()
        return x.grad, out

    exact(program)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))


def test_training_with_momentum_is_exact_over_steps() -> None:
    def program(region: Region) -> Any:
        m = model()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for i in range(4):
            optimizer.zero_grad()
            region(m, leaf(5, 8, seed=i)).pow(2).sum().backward()
            optimizer.step()
        return *(p.detach() for p in m.parameters()), *m.buffers()

    exact(program)


def test_accumulation_with_backwards_in_reverse_order_is_exact() -> None:
    def program(region: Region) -> Any:
        m = model()
        losses = [region(m, leaf(5, 8, seed=i)).pow(2).sum() for i in range(4)]
        for loss in reversed(losses):
            loss.backward()
        return *(p.grad for p in m.parameters()), *m.buffers()

    exact(program)


def test_parametrizations_with_buffers_are_exact() -> None:
    def program(region: Region) -> Any:
        torch.manual_seed(3)
        weighted = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        x = leaf(8)
        region(lambda t: spectral(weighted(t)).sin(), x).sum().backward()
        return x.grad, *(p.grad for p in weighted.parameters()), *(b.clone() for b in spectral.buffers())

    exact(program)


def test_instance_norm_statistics_change_once() -> None:
    def program(region: Region) -> Any:
        m = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True, affine=True), nn.BatchNorm1d(3))
        x = leaf(8, 3, 2)
        for _ in range(3):
            region(m, x).sin().sum().backward()
        return x.grad, *(b.clone() for b in m.buffers())

    exact(program)


def test_the_tail_of_a_graph_that_is_dropped_does_not_change_what_is_left() -> None:
    def program(region: Region) -> Any:
        x, y = leaf(8), leaf(8, seed=2)
        u, v = region(
            lambda a, b: (F.rrelu(a.sin(), training=True), F.rrelu(b.exp() - 1, training=True)), x, y
        )
        del v
        u.sum().backward()
        return (x.grad,)

    exact(program)
