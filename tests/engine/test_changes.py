"""Tensors that change between forward and backward: refused where plain autograd refuses, and where a replay would
read the new value."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc
from distckpt import compat
from distckpt.errors import InputChanged, ParameterChanged, ReplayError

from .exact import Region, exact, leaf, plain, same_bits


def test_an_optimizer_step_between_forward_and_backward_is_refused() -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = leaf(2, 4)
    out = dc.checkpoint(lambda t: layer(t).sin(), x)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ReplayError) as caught:
        out.sum().backward()
    assert caught.value.code == "DC124"
    assert "after backward" in str(caught.value)


@pytest.mark.parametrize("trainable", [True, False])
def test_an_in_place_change_of_a_captured_tensor_that_was_saved_is_refused(trainable: bool) -> None:
    captured = leaf(4) if trainable else torch.ones(4)
    x = leaf(4)
    for value in (captured, captured * 1.0, captured.view(2, 2).t().reshape(4)):
        out = dc.checkpoint(lambda t, v=value: (t * v).sin() * v.view(4), x)
        with torch.no_grad():
            value.add_(1.0)
        with pytest.raises(ReplayError) as caught:
            out.sum().backward()
        assert caught.value.code in ("DC111", "DC112")


@pytest.mark.parametrize("place", ["positional", "keyword", "nested"])
def test_an_input_restored_by_outer_hooks_may_come_back_with_another_version(place: str) -> None:
    def program(region: Region) -> Any:
        w, y = leaf(4), leaf(4, seed=2) * 1.0
        with torch.no_grad():
            w.add_(1.0), y.add_(1.0)  # versions that a copy does not have

        def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * b).sin() * b.view(2, 2).t().reshape(4) * a.detach()

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            if place == "positional":
                out = region(fn, w, y)
            elif place == "keyword":
                out = region(fn, a=w, b=y)
            else:
                out = region(lambda d: fn(*d["both"]), {"both": [w, y]})
        out.sum().backward()
        return out, w.grad

    exact(program)


@pytest.mark.parametrize(
    "surface", [dc.checkpoint, functools.partial(compat.checkpoint, use_reentrant=False)]
)
def test_an_input_that_hooks_copied_and_the_function_writes_into_is_exact_in_one_replay(surface: Any) -> None:
    def program(region: Region, backwards: int = 1) -> Any:
        x, y = leaf(4), torch.ones(4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            out = region(lambda a, b: (b.mul_(0.5) * a).sin(), x, y)
        for i in range(backwards):
            out.sum().backward(retain_graph=i + 1 < backwards)
        return out, x.grad

    want, found = program(plain), program(surface)
    assert all(map(same_bits, want, found))
    with pytest.raises(InputChanged):  # the second replay is handed the copy that the first wrote into
        program(surface, backwards=2)


def test_an_in_place_change_of_a_parameter_that_is_an_input_is_refused() -> None:
    w = nn.Parameter(torch.ones(4))
    out = dc.checkpoint(lambda t: t.sin().exp(), w)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(InputChanged):
        out.sum().backward()


def test_an_in_place_change_of_a_saved_intermediate_is_refused_as_without_a_region() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        y = t.exp()
        z = y.sin()
        with torch.no_grad():
            y.mul_(2.0)
        return z * 1.0

    x = leaf(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fn(x).sum().backward()
    with pytest.raises(ParameterChanged) as caught:
        dc.checkpoint(fn, x, early_stop=False).sum().backward()
    assert caught.value.code == "DC112"
    # a replay that stops before the change has the value that was saved
    want = torch.autograd.grad(x.exp().sin().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(dc.checkpoint(fn, x).sum(), x)[0], want)


def test_an_in_place_change_of_an_intermediate_before_it_is_saved_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        out = region(lambda t: (t * 2).mul_(2.0).add_(t).sin().mul_(3.0), x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_an_output_changed_in_place_that_the_region_saved_is_refused_as_without_a_region() -> None:
    x = leaf(4)
    plain = x.exp()
    plain.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain.sum().backward()
    out = dc.checkpoint(lambda t: t.exp(), x)
    out.mul_(2.0)
    grads = []
    try:
        out.sum().backward()
        grads.append(x.grad)
    except RuntimeError:
        return
    # the replay has the unchanged value, so the gradient is right where plain autograd would refuse
    assert torch.equal(grads[0], torch.autograd.grad((x.exp() * 2).sum(), x)[0])


def test_an_output_changed_in_place_that_nobody_saved_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        out = region(lambda t: t.exp() * 2, x)
        out.add_(1.0)
        (out * out).sum().backward()
        return out, x.grad

    exact(program)


def test_a_saved_value_of_another_region_is_not_touched_by_a_replay() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        y = region(lambda t: t.exp().sin(), x)
        z = region(lambda t: (t * 2).mul_(2.0).sin(), y)
        (y * z).sum().backward()
        return x.grad, y, z

    exact(program)


def test_an_input_changed_in_place_inside_its_own_region_is_refused() -> None:
    """The replay would start from the changed value."""
    y = leaf(4) * 1.0
    out = dc.checkpoint(lambda t: t.mul_(2.0).sin().exp(), y)
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_a_buffer_input_that_needs_no_gradient_is_version_checked_too() -> None:
    mask = torch.ones(4)
    out = dc.checkpoint(lambda t, m: (t * m).sin(), leaf(4), mask)
    mask.zero_()
    with pytest.raises(InputChanged):
        out.sum().backward()


@pytest.mark.parametrize("check", ["none", "default", "fingerprint", "bitwise"])
def test_a_frozen_parameter_whose_storage_a_sharding_engine_freed_is_refilled_for_the_replay(
    check: str,
) -> None:
    """ZeRO-3: the live parameter has shape [0] outside its module's forward; it is checked while replaying."""

    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4), requires_grad=False)
            self.full = self.weight.data
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data = self.full.clone()
            out = nn.functional.linear(x, self.weight, self.bias)
            self.weight.data = torch.empty(0)
            return out.sin()

    def program(region: Region) -> Any:
        module = Sharded()
        x = leaf(2, 4)
        out = region(module, x)
        out.sum().backward()
        assert module.weight.numel() == 0
        return out, x.grad, module.bias.grad

    exact_if_plain_works(program, check)


def exact_if_plain_works(program: Any, check: str) -> None:
    """Plain autograd cannot do without the gathered weight; compare with the same module never freed."""
    import functools

    found = program(functools.partial(dc.checkpoint, determinism_check=check))
    weight = torch.linspace(-1, 1, 16).view(4, 4)
    bias, x = torch.zeros(4, requires_grad=True), leaf(2, 4)
    out = nn.functional.linear(x, weight, bias).sin()
    out.sum().backward()
    for a, b in zip(found, (out, x.grad, bias.grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_parameter_whose_storage_is_resized_to_zero_and_refilled_is_exact(trainable: bool) -> None:
    """FSDP frees the unsharded storage between forward and replay and gathers into the same tensor again."""
    full = torch.linspace(-1, 1, 16).view(4, 4)
    weight = nn.Parameter(full.clone(), requires_grad=trainable)
    storage = weight.untyped_storage()
    nbytes = storage.nbytes()

    def gather() -> None:
        if storage.nbytes() == 0:
            storage.resize_(nbytes)
            with torch.autograd._unsafe_preserve_version_counter((weight,)), torch.no_grad():
                weight.copy_(full)

    x = leaf(2, 4)

    def fn(t: torch.Tensor) -> torch.Tensor:
        gather()
        return nn.functional.linear(t, weight).sin() @ weight

    out = dc.checkpoint(fn, x)
    storage.resize_(0)
    out.sum().backward()
    grads = (x.grad, weight.grad)
    x2, w2 = leaf(2, 4), full.clone().requires_grad_(trainable)
    (nn.functional.linear(x2, w2).sin() @ w2).sum().backward()
    assert torch.equal(grads[0], x2.grad)
    assert (grads[1] is None) == (w2.grad is None)
    if trainable:
        assert torch.equal(grads[1], w2.grad)
