"""Regions and torch_xla's scan, in one process; each finding is a line of the report. Run by test_scan.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla
from distckpt_backends.errors import DistckptError
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._functorch import config as functorch_config
from torch_xla.experimental.scan import scan
from torch_xla.experimental.scan_layers import scan_layers

import distckpt as dc
from tests.xla.blocks import Block, bits, difference

BATCH, WIDTH = 16, 32


def make_layers(dropout: float = 0.0, *, fused: bool = False, count: int = 4) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(dropout, fused=fused, sizes=(WIDTH, 2 * WIDTH)) for _ in range(count)).to(
        "xla"
    )


def step(layers: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of one step, and the random state after it."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH, dtype=next(layers.parameters()).dtype).to("xla").requires_grad_()
    layers.zero_grad()
    torch_xla.sync(wait=True)
    torch_xla.manual_seed(7)
    loss = call(x).square().mean()
    loss.backward()
    torch_xla.sync(wait=True)
    found = [loss, x.grad, *(p.grad for p in layers.parameters())]
    assert all(g is not None for g in found)
    return [g.detach().cpu() for g in found if g is not None]


def rounding() -> dict[str, Any]:
    found = {}
    for dtype in (torch.float32, torch.float64):
        layers = make_layers(0.1, count=2).to(dtype)
        plain = step(layers, functools.partial(scan_layers, layers))
        with dc.apply(layers, "*"):
            regions = step(layers, functools.partial(scan_layers, layers))
        found[f"{dtype}: loss"] = torch.equal(plain[0], regions[0])
        found[f"{dtype}: difference"] = difference(plain, regions)
    return found


def forms() -> dict[str, Any]:
    class Two(nn.Module):
        """Two regions in one layer, and one around both."""

        def __init__(self, inner: bool, outer: bool) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.inner, self.outer = inner, outer

        def half(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            h = F.gelu(linear(x))
            return x + h * torch.bernoulli(torch.full_like(h, 0.5))

        def both(self, x: torch.Tensor) -> torch.Tensor:
            for linear in (self.a, self.b):
                x = dc.checkpoint(self.half, linear, x) if self.inner else self.half(linear, x)
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return dc.checkpoint(self.both, x) if self.outer else self.both(x)

    def run(inner: bool, outer: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList(Two(inner, outer) for _ in range(3)).to("xla")
        return step(layers, functools.partial(scan_layers, layers))

    return {"nested regions in a layer, difference": difference(run(False, False), run(True, True))}


def masks() -> dict[str, bool]:
    """The gradient of x * mask is the mask, so one look tells whether backward used the mask of the forward."""

    def same_mask(body: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> bool:
        carry = torch.ones(8, device="xla", requires_grad=True)
        xs = torch.ones(3, 8, device="xla").requires_grad_()
        torch_xla.manual_seed(3)
        _, ys = scan(lambda c, x: (c * 1.0, body(c.sin() * x)), carry, xs, **options)
        ys.sum().backward()
        torch_xla.sync()
        assert xs.grad is not None
        return torch.equal(xs.grad.cpu(), ys.detach().cpu())

    def draw(x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.5))

    def compare(x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand_like(x) > 0.5)

    def recompute_all(*args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=0.0):
            return min_cut_rematerialization_partition(*args, **kwargs)

    return {
        "bernoulli": same_mask(functools.partial(dc.checkpoint, draw)),
        "rand_like": same_mask(functools.partial(dc.checkpoint, compare)),
        "torch_xla's own way": same_mask(draw, partition_fn=recompute_all),
    }


def around() -> dict[str, bool]:
    layers = make_layers()

    def chunks(call: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        for i in range(0, len(layers), 2):
            x = call(functools.partial(scan_layers, layers[i : i + 2]), x)
        return x

    plain = bits(step(layers, functools.partial(chunks, lambda f, x: f(x))))
    reentrant = functools.partial(dc.checkpoint, use_reentrant=True)
    return {
        "a region around a scan": bits(step(layers, functools.partial(chunks, dc.checkpoint))) == plain,
        "a reentrant region around a scan": bits(step(layers, functools.partial(chunks, reentrant))) == plain,
    }


def refusals() -> dict[str, str]:
    def code(layers: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> str:
        try:
            step(layers, call)
        except DistckptError as error:
            return error.code
        return "none"

    def scanned(layers: nn.ModuleList, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return functools.partial(scan_layers, layers, **options)

    class Inner(nn.Linear):
        """One region in a layer, made by `region(function, x)`."""

        region: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return type(self).region(lambda t: torch.tanh(super(Inner, self).forward(t)), x)

    linears = nn.ModuleList(Inner(WIDTH, WIDTH) for _ in range(2)).to("xla")
    contexts = functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    found = {}
    for name, region in {
        "reentrant": functools.partial(dc.checkpoint, use_reentrant=True),
        "context_fn": dc.checkpoint(context_fn=contexts),
        "debug": dc.checkpoint(debug=True),
        "bitwise": dc.checkpoint(determinism_check="bitwise"),
        "pin": lambda f, x: dc.checkpoint(lambda t: f(t) * dc.pin(t.detach() > 0), x),
    }.items():
        Inner.region = staticmethod(
            region if name in ("reentrant", "pin") else lambda f, x, r=region: r(f)(x)
        )
        found[name] = code(linears, scanned(linears))
    Inner.region = staticmethod(dc.checkpoint)
    found["and after all these a plain region"] = code(linears, scanned(linears))

    layers = make_layers(0.5, fused=True, count=2)
    with dc.apply(layers, "*"):
        found["fused dropout"] = code(layers, scanned(layers))

    layers = make_layers(0.5, count=2)
    found["drawing scan in a region"] = code(layers, lambda x: dc.checkpoint(scanned(layers), x))
    found["drawing scan in a reentrant region"] = code(
        layers, lambda x: dc.checkpoint(scanned(layers), x, use_reentrant=True)
    )
    found["drawing scan without gradients in a region"] = code(
        layers, lambda x: dc.checkpoint(lambda t: layers[0](t) + torch.no_grad()(scanned(layers))(t), x)
    )
    pure = scanned(layers, is_layer_pure=True)
    pure(torch.randn(BATCH, WIDTH).to("xla").requires_grad_())
    found["cached drawing scan in a region"] = code(layers, lambda x: dc.checkpoint(pure, x))
    return found


if __name__ == "__main__":
    parts = (rounding, forms, masks, around, refusals)
    print(json.dumps({part.__name__: part() for part in parts}))
