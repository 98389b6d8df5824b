"""What the random programs once found, each as a test of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import distckpt as dc

from . import program as p
from .engines import engine
from .judge import judge

ALWAYS = {"early_stop": False}
KEEP_MM = partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])


def gradient(fn: Callable[..., torch.Tensor], x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the gradient of a region at ``x`` (of the plain call without options)."""
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    out = dc.checkpoint(fn, x, **options) if options else fn(x)
    (out * 3.0).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("check", ["fingerprint", "bitwise"])
def test_value_checks_stay_out_of_a_selective_region(check: str) -> None:
    x = torch.randn(4, 4)
    got = gradient(lambda x: (x @ x).sin(), x, context_fn=KEEP_MM, determinism_check=check, **ALWAYS)
    assert torch.equal(got, gradient(lambda x: (x @ x).sin(), x))


@pytest.mark.parametrize("early_stop", [True, False])
def test_rrelu_that_draws_nothing_is_exact_under_early_stop(early_stop: bool) -> None:
    # the kernel draws for negative elements only, but fills its saved noise for all of them
    positive = torch.randn(4, 4).sigmoid()
    fn = partial(F.rrelu, lower=0.1, upper=0.4, training=True)
    assert torch.equal(gradient(fn, positive, early_stop=early_stop), gradient(fn, positive))


def test_a_selective_region_shares_autocasts_cached_casts() -> None:
    weights = torch.randn(4, 4), torch.randn(4, 4)

    def run(x: torch.Tensor, region: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return region(lambda x: F.linear(x, weights[0]), x) + F.linear(x, weights[1])

    x = torch.randn(4, 4)
    plain = gradient(partial(run, region=lambda fn, x: fn(x)), x)
    assert torch.equal(gradient(partial(run, region=partial(dc.checkpoint, context_fn=KEEP_MM)), x), plain)


@pytest.mark.parametrize("check", ["none", "default", "bitwise"])
def test_a_nested_region_that_changes_its_input_is_refused_at_every_check_level(check: str) -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        return x.sin()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return dc.checkpoint(change, x * 3.0, determinism_check=check, **ALWAYS)

    with pytest.raises(dc.CheckpointError, match="changed in place"):
        gradient(outer, torch.randn(4, 4), determinism_check=check, **ALWAYS)


@pytest.mark.parametrize("check", ["none", "default", "fingerprint", "bitwise"])
def test_a_batch_norm_used_twice_in_a_region_passes_every_check_and_counts_once(check: str) -> None:
    plain, norm = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    expected = gradient(lambda x: plain(plain(x)), x)
    assert torch.equal(gradient(lambda x: norm(norm(x)), x, determinism_check=check), expected)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 2
    assert norm.running_mean is not None
    assert plain.running_mean is not None
    assert torch.equal(norm.running_mean, plain.running_mean)


def test_a_kept_batch_norm_result_passes_the_value_checks() -> None:
    keep = partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.native_batch_norm.default])
    norm = nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    got = gradient(lambda x: norm(x).sin(), x, context_fn=keep, determinism_check="bitwise", **ALWAYS)
    assert torch.equal(got, gradient(lambda x: nn.BatchNorm1d(4)(x).sin(), x))


def test_a_kept_view_that_is_written_through_is_exact_or_refused() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        out = x * 1.0
        out[0].copy_(out.detach()[1].clone())
        return (out @ out).sin()

    keep = partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.select.int])
    x = torch.randn(4, 4)
    try:
        got = gradient(write, x, context_fn=keep, **ALWAYS)
    except dc.CheckpointError:
        return
    assert torch.equal(got, gradient(write, x))


def test_a_kept_view_under_copying_hooks_survives_a_second_backward() -> None:
    keep = partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.t.default])
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = dc.checkpoint(lambda x: F.linear(x * 2.0, weight), x, context_fn=keep, **ALWAYS).sum()
    (first,) = torch.autograd.grad(out, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out, weight)
    assert torch.equal(first, second)


def test_value_checks_know_buffers_that_change_before_a_gradient_taken_inside() -> None:
    def run(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        out = norm(x)
        (inner,) = torch.autograd.grad(norm(out).sum(), out)
        return inner.sin() + out

    x = torch.randn(8, 4)
    norm, plain = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    got = gradient(lambda x: run(x, norm), x, determinism_check="fingerprint", **ALWAYS)
    assert torch.equal(got, gradient(lambda x: run(x, plain), x))


def test_a_gradient_taken_in_nested_selective_regions_is_exact() -> None:
    weight = torch.randn(4, 4)

    def inner(x: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad((x @ weight).sin().sum(), x, create_graph=True)
        return found

    options = {"context_fn": KEEP_MM, **ALWAYS}
    x = torch.randn(4, 4)
    got = gradient(lambda x: dc.checkpoint(inner, x * 1.0, **options), x, **options)
    assert torch.equal(got, gradient(lambda x: inner(x * 1.0), x))


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_replay_during_the_record_goes_no_further_than_the_record(early_stop: bool) -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        (inner,) = torch.autograd.grad(x.tanh().exp().sum(), x)
        x.mul_(0.5)
        return inner + x.detach()

    start = torch.randn(4, 4, requires_grad=True)
    expected = change(start.sin())
    assert torch.equal(dc.checkpoint(change, start.sin(), early_stop=early_stop), expected)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_gradient_through_rrelu_taken_inside_a_region_is_exact(early_stop: bool) -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(F.rrelu(x, 0.1, 0.4, training=True).sum(), x)
        return found + x

    x = torch.randn(4, 4)
    assert torch.equal(gradient(inner, x, early_stop=early_stop), gradient(inner, x))


def test_an_input_changed_by_its_own_region_under_copying_hooks_is_exact_or_refused() -> None:
    # the replay gets the copy of the hooks, and writes to it
    x = torch.randn(4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = dc.checkpoint(lambda z: z.tanh_(), x * 2.0, **ALWAYS).sum()
    try:
        (first,) = torch.autograd.grad(out, x, retain_graph=True)
        (second,) = torch.autograd.grad(out, x)
    except dc.CheckpointError:
        return
    assert torch.equal(first, second)


def test_an_input_passed_twice_and_changed_under_copying_hooks_is_exact_or_refused() -> None:
    def change(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.mul_(0.5)
        return b.sin()

    def run(region: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(0.0, 1.0, 4).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            value = x * 2.0
            out = region(change, value, value).sum()
        return torch.autograd.grad(out, x)[0]

    try:
        got = run(partial(dc.checkpoint, **ALWAYS))
    except dc.CheckpointError:
        return
    assert torch.equal(got, run(lambda fn, *args: fn(*args)))


@pytest.mark.parametrize(
    ("body", "early_stop", "selective"),
    [
        ((p.InnerGrad(0, (p.Unary("sin", 0),), False, False, False), p.Draw("rrelu", 0)), True, "list: mm"),
        ((p.InnerGrad(0, (p.Draw("rrelu", 0),), True, False, False),), False, "policy: alternate"),
    ],
)
def test_rrelu_and_a_gradient_inside_a_nested_region_of_a_selective_region(
    body: tuple[p.Step, ...], early_stop: bool, selective: str
) -> None:
    inputs = ((0, "arg"),)
    inner = p.Region(body, inputs, "tensor", "function", p.Options(early_stop=False))
    before = (p.Unary("sin", 0), p.GradHook(0), inner)
    options = p.Options(early_stop=early_stop, selective=selective)
    outer = p.Region(
        before if selective.startswith("policy") else (inner,), inputs, "tensor", "function", options
    )
    program = p.Program((outer,), "backward", 0, 1, False, False, False, 0)
    assert judge(program, engine("dc")).kind == "equal"


def _nested(body: tuple[p.Step, ...], selective: str, *before: p.Step) -> p.Region:
    """A selective region with a region of ``body`` in it, ``before`` running ahead of that one."""
    inner = p.Region(body, ((0, "arg"),), "tensor", "function", p.Options(early_stop=False))
    options = p.Options(early_stop=False, selective=selective)
    return p.Region((*before, inner), ((0, "arg"),), "tensor", "function", options)


_RRELU = p.InnerGrad(0, (p.Draw("rrelu", 0),), False, False, False)


@pytest.mark.parametrize(
    "outer",
    [
        _nested((p.Unary("sin", 0), _RRELU), "list: sin, mm, addmm"),
        _nested(
            (p.InnerGrad(0, (p.Draw("rrelu", 0),), True, False, False),), "policy: alternate", p.GradHook(0)
        ),
    ],
)
def test_a_gradient_through_rrelu_inside_a_region_of_a_selective_region_is_exact(outer: p.Region) -> None:
    # the second replay of the nested region was taken for the user's hooks, and what the outer one kept for a save
    program = p.Program((outer,), "backward", 0, 1, False, False, False, 0)
    assert judge(program, engine("dc")).kind == "equal"


def test_hooks_on_a_kept_output_under_copying_hooks_run_in_a_second_backward_too() -> None:
    hooked = p.Region(
        (p.Unary("sin", 0), p.GradHook(0), p.GradHook(0)),
        ((1, "arg"),),
        "tuple",
        "function",
        p.Options(early_stop=False),
    )
    inner = p.InnerGrad(0, (p.Unary("sin", 0), hooked), True, False, False)
    options = p.Options(early_stop=False, selective="policy: alternate")
    outer = p.Region((inner,), ((0, "arg"),), "tensor", "function", options)
    program = p.Program((p.Within("hooks", (outer,)),), "backward twice", 0, 1, False, False, False, 0)
    assert judge(program, engine("dc")).kind == "equal"


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_region_of_compat_writes_into_a_keyword_in_every_replay(early_stop: bool) -> None:
    # without early stop torch's nested region is replayed twice more, and so writes twice more
    def writes(checkpoint: Callable[..., torch.Tensor]) -> float:
        region = partial(checkpoint, use_reentrant=False, early_stop=early_stop)

        def change(x: torch.Tensor) -> torch.Tensor:
            leaf = x.add_(1.0).detach().requires_grad_()
            return torch.autograd.grad(F.dropout(leaf).sum(), leaf)[0]

        x = torch.zeros(1)
        region(lambda *, x: region(change, x), x=x)
        return x.item()

    assert writes(dc.compat.checkpoint) == 2.0
    assert writes(torch_checkpoint) == (2.0 if early_stop else 4.0)
