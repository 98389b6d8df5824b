"""TorchScript inside regions: record and replay run one graph."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.errors import ScriptMismatch

from .exact import Region, counted, exact, leaf, plain, same_bits
from .test_threads import together


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # TorchScript is deprecated
            warnings.simplefilter("ignore", kind)
        yield


SOURCE = """
def f(x, w):
    y = torch.tanh(x @ w)
    z = torch.sigmoid(y) * x
    return torch.exp(z).sin()
"""


def eager(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.exp(torch.sigmoid(torch.tanh(x @ w)) * x).sin()


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.tanh(self.linear(x)) * torch.sigmoid(x), 0.3).exp() * x


class Around(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x).sin())


def function() -> tuple[Any, Any]:
    w = leaf(6, 6, seed=7)
    scripted = torch.jit.CompilationUnit(
        SOURCE
    ).f  # a new one each time: TorchScript shares what it has compiled
    return (lambda x: scripted(x, w)), (lambda x: eager(x, w))


def module() -> tuple[Any, Any]:
    torch.manual_seed(1)
    gated = Gated()
    return torch.jit.script(gated), gated


def traced() -> tuple[Any, Any]:
    torch.manual_seed(1)
    chain = torch.nn.Sequential(
        torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Sigmoid()
    )
    return torch.jit.trace(chain, torch.ones(6, 6)), chain


def submodule() -> tuple[Any, Any]:
    scripted, gated = module()
    return Around(scripted), Around(gated)


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "function": function,
    "module": module,
    "traced": traced,
    "submodule": submodule,
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "last": lambda f: lambda x: f(x.sin()),
    "in the middle": lambda f: lambda x: f(x.sin()).exp(),
    "twice": lambda f: lambda x: f(f(x.sin())) * x,
}


def results(region: Region, fn: Any) -> list[Any]:
    torch.manual_seed(0)
    x = leaf(6, 6)
    out = region(fn, x)
    torch.rand(3)
    return [out, torch.autograd.grad(out.sum(), x)[0], torch.rand(3)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_in_a_region_is_exact_from_the_first_call_on(kind: str, place: str) -> None:
    scripted, unscripted = (PLACES[place](f) for f in KINDS[kind]())
    want = results(plain, unscripted)
    for call in range(4):
        found = results(dc.checkpoint, scripted)
        assert all(map(same_bits, want, found)), f"call {call}"
    assert torch._C._get_graph_executor_optimize()


def test_torchscript_in_a_reentrant_region_is_as_it_is_written_in_every_replay() -> None:
    scripted, unscripted = function()

    def program(region: Region, fn: Any) -> Any:
        x = leaf(6, 6)
        out = region(fn, x)
        for _ in range(3):
            out.sum().backward(retain_graph=True)
        return out, x.grad

    want = program(plain, unscripted)
    found = program(functools.partial(dc.checkpoint, use_reentrant=True), scripted)
    assert all(map(same_bits, want, found))


@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_that_was_optimised_before_is_exact(kind: str) -> None:
    scripted, _ = KINDS[kind]()
    for _ in range(3):
        want = results(plain, scripted)
    for _ in range(3):
        assert all(map(same_bits, want, results(dc.checkpoint, scripted)))


def test_one_scripted_function_in_many_regions_is_exact() -> None:
    scripted, unscripted = function()

    def program(region: Region, fn: Any) -> list[Any]:
        x = leaf(6, 6)
        h = x
        for _ in range(4):
            h = region(lambda t: region(fn, t.sin()) * t, h)
        return [h, torch.autograd.grad(h.sum(), x)[0]]

    want = program(plain, unscripted)
    for _ in range(3):
        assert all(map(same_bits, want, program(dc.checkpoint, scripted)))


def test_torchscript_on_two_threads_is_exact() -> None:
    def job() -> None:
        scripted, unscripted = function()
        want = [leaf(6, 6)]
        want = torch.autograd.grad(unscripted(want[0]).sum(), want[0])
        for _ in range(4):
            x = leaf(6, 6)
            found = torch.autograd.grad(dc.checkpoint(scripted, x).sum(), x)
            assert same_bits(want[0], found[0])
        assert torch._C._get_graph_executor_optimize()

    together(job, job)


def test_torchscript_optimised_between_forward_and_replay_is_refused_and_exact_from_the_next_step_on() -> (
    None
):
    scripted, _ = function()
    x = leaf(6, 6)
    out = dc.checkpoint(lambda t: scripted(t.sin()).exp(), x).sum()
    for _ in range(3):  # outside of regions: now it is optimised
        want = results(plain, scripted)
    with pytest.raises(ScriptMismatch) as caught:
        out.backward()
    assert caught.value.code == "DC128"
    assert all(map(same_bits, want, results(dc.checkpoint, scripted)))


def test_a_gradient_taken_in_a_region_through_torchscript_is_exact() -> None:
    scripted, unscripted = function()

    def fn(f: Any, t: torch.Tensor) -> torch.Tensor:
        inner = f(t.sin())
        (g,) = torch.autograd.grad(inner.sum(), t, create_graph=True)
        return (g * t).sin()

    want = results(plain, functools.partial(fn, unscripted))
    for _ in range(3):
        assert all(map(same_bits, want, results(dc.checkpoint, functools.partial(fn, scripted))))


def test_a_region_that_captures_an_intermediate_value_replays_where_torchscript_ran() -> None:
    script = torch.jit.script(eager)

    def program(region: Region) -> Any:
        x, w = leaf(6, 6), leaf(6, 6, seed=7)
        script(x, w)
        shared = (x.sin() @ w).exp()
        out = region(lambda t: t * shared.cos(), x)
        out.sum().backward()
        return out, x.grad, w.grad

    together(lambda: exact(program))


def test_closing_a_region_unpacks_none_of_its_inputs_where_torchscript_ran() -> None:
    """An outer region holds them: it would replay in the middle of its own forward."""
    script = torch.jit.script(eager)

    def outer(region: Region, t: torch.Tensor) -> torch.Tensor:
        mid = t.sin()
        return region(lambda a, b, c: (a * b[0] * mid * c).exp().sin(), mid, [mid], c=mid).cos()

    def job() -> None:
        x, w = leaf(6, 6), leaf(6, 6, seed=7)
        script(x, w)
        out, counts = counted(lambda: dc.checkpoint(functools.partial(outer, dc.checkpoint), x))
        assert (counts.regions, counts.replays) == (2, 0)
        want = outer(plain, x)
        assert same_bits(torch.autograd.grad(want.sum(), x)[0], torch.autograd.grad(out.sum(), x)[0])

    together(job)


class Named(torch.Tensor):
    """A tensor subclass that changes nothing."""


def test_a_region_over_a_tensor_subclass_replays_where_torchscript_ran() -> None:
    torch.jit.CompilationUnit(SOURCE).f(leaf(3, 3), leaf(3, 3))

    def run(region: Region) -> torch.Tensor:
        x = leaf(4)
        region(lambda a: (a.sin() * 3).cos(), (x * 2).as_subclass(Named)).sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(run(dc.checkpoint), run(plain))


def test_a_region_with_a_pin_replays_where_torchscript_ran() -> None:
    script = torch.jit.script(eager)

    def program(region: Region) -> Any:
        x, w = leaf(6, 6), leaf(6, 6, seed=7)
        script(x, w)
        out = region(lambda t: dc.pin(t.sin()).exp() * t, x)
        out.sum().backward()
        return out, x.grad

    together(lambda: exact(program))
