"""Pinned values: decided once, replayed and never recomputed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import distckpt as dc
from distckpt.errors import PinMismatch

from .exact import Region, exact, leaf


class Route(NamedTuple):
    weights: torch.Tensor
    index: torch.Tensor


class Router:
    """Top-k on scores that differ in the replay, as a non-deterministic kernel's do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, w: torch.Tensor, pinned: bool) -> torch.Tensor:
        self.calls += 1
        scores = (x @ w).softmax(-1)
        noise = 0.9 if self.calls > 1 else 0.0
        best = torch.topk(scores.detach() + noise * torch.arange(4.0), 2)
        index = dc.pin(best.indices) if pinned else best.indices
        return (scores.gather(-1, index).sin() * x[:, :2]).exp()


def test_a_pinned_router_choice_is_exact_although_the_replay_would_choose_otherwise() -> None:
    def program(region: Region) -> Any:
        x, w, router = leaf(6, 4), leaf(4, 4, seed=2), Router()
        out = region(router, x, w, True)
        out.sum().backward()
        return out, x.grad, w.grad

    exact(program)


def test_the_same_router_without_pin_is_wrong_and_a_value_check_says_so() -> None:
    out = dc.checkpoint(Router(), leaf(6, 4), leaf(4, 4, seed=2), False, determinism_check="bitwise")
    with pytest.raises(dc.CheckpointError, match="values differ"):
        out.sum().backward()


def test_outside_a_region_a_pin_is_the_value_itself() -> None:
    value = {"a": leaf(3), "b": [1, "x"]}
    assert dc.pin(value) is value
    with torch.no_grad():
        out = dc.checkpoint(lambda t: dc.pin(t), value["a"])
    assert out is value["a"]


def test_any_pytree_is_pinned_whole() -> None:
    calls = 0

    def fn(t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        route = dc.pin(
            {"route": Route(t.detach() * calls, torch.tensor([calls])), "scale": calls, "name": "x"}
        )
        assert type(route["route"]) is Route
        assert route["name"] == "x"
        return (t * route["route"].weights * route["scale"] + route["route"].index).sin().exp()

    x = leaf(4)
    dc.checkpoint(fn, x).sum().backward()
    assert calls == 2
    (want,) = torch.autograd.grad((x * x.detach() + 1).sin().exp().sum(), x)
    assert torch.equal(x.grad, want)


def test_a_pinned_value_that_requires_grad_keeps_its_gradient_path() -> None:
    calls = 0

    def program(region: Region) -> Any:
        nonlocal calls
        calls = 0
        x = leaf(4)

        def fn(t: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            noisy = dc.pin(t.sin() + (calls - 1) * 0.5)
            return noisy.exp() * t

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_pins_of_nested_regions_are_replayed_at_every_level() -> None:
    calls = 0

    def inner(t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (t * dc.pin(torch.tensor(float(calls)))).sin().exp()

    def outer(t: torch.Tensor) -> torch.Tensor:
        a = dc.pin(torch.tensor(10.0 + calls))
        return dc.checkpoint(inner, t * a).sin() * dc.checkpoint(inner, t)

    x = leaf(4)
    dc.checkpoint(outer, x).sum().backward()

    def expected(t: torch.Tensor) -> torch.Tensor:
        return (t * 10.0).sin().exp().sin() * (t * 2.0).sin().exp()

    (want,) = torch.autograd.grad(expected(x).sum(), x)
    assert torch.allclose(x.grad, want)
    assert calls >= 4


def test_pins_in_several_backwards_and_double_backward_stay() -> None:
    calls = 0

    def fn(t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (t * dc.pin(torch.tensor(float(calls)))).sin().exp()

    x = leaf(4)
    out = dc.checkpoint(fn, x).sum()
    grads = [torch.autograd.grad(out, x, retain_graph=True, create_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    (twice,) = torch.autograd.grad(grads[0].sum(), x)
    want = torch.autograd.grad(torch.autograd.grad(x.sin().exp().sum(), x, create_graph=True)[0].sum(), x)[0]
    assert torch.equal(twice, want)


def test_a_python_decision_can_be_pinned_too() -> None:
    flips = iter([True, False, False])

    def fn(t: torch.Tensor) -> torch.Tensor:
        return t.sin().exp() if dc.pin(next(flips)) else t.cos()

    x = leaf(4)
    dc.checkpoint(fn, x).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_pinning_more_values_than_the_forward_did_is_refused() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        t = dc.pin(torch.ones(4)) * t.sin()
        if dc.is_recomputing():
            dc.pin(torch.ones(4))
        return t.exp()

    out = dc.checkpoint(fn, leaf(4))
    with pytest.raises(PinMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC114"
    assert "number 2" in str(caught.value)


def test_changing_a_pinned_value_in_place_is_refused() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        mask = dc.pin(torch.ones(4))
        y = (t * mask).sin()
        mask.mul_(2.0)
        return (y * mask).exp()

    with pytest.raises(RuntimeError) as caught:
        dc.checkpoint(fn, leaf(4)).sum().backward()
    assert getattr(caught.value, "code", "DC112") in ("DC112", "DC114")


def test_a_pinned_value_dies_with_the_graph() -> None:
    import weakref

    refs: list[weakref.ref[Any]] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        index = torch.topk(t.detach(), 2).indices
        refs.append(weakref.ref(index.untyped_storage()))
        return t[dc.pin(index)].sin().exp()

    out = dc.checkpoint(fn, leaf(4))
    out.sum().backward()
    del out
    assert all(ref() is None for ref in refs)


def test_a_region_under_torch_func_grad_is_refused_with_or_without_pin() -> None:
    for fn in (lambda t: t.sin().sum(), lambda t: (t * dc.pin(t.detach())).sum()):
        with pytest.raises(RuntimeError):
            torch.func.grad(lambda t, f=fn: dc.checkpoint(f, t))(torch.ones(3))


def test_a_pin_under_torch_func_outside_a_region_is_the_value() -> None:
    grad = torch.func.grad(lambda t: (t * dc.pin(t.detach())).sum())(torch.full((3,), 2.0))
    assert torch.equal(grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("early_stop", [True, False])
def test_an_argument_and_its_pinned_self_in_a_nested_region_are_exact(early_stop: bool) -> None:
    """One object in the forward, two in the replay: the region around must not count its saves otherwise."""

    def program(region: Any) -> Any:
        x = leaf(4)

        def outer(t: torch.Tensor) -> torch.Tensor:
            pinned = dc.pin(t)
            return region(lambda a, b: a.sin() * b.cos(), t, pinned)

        region(outer, x).sum().backward()
        return [x.grad]

    exact(program, early_stop=early_stop)
