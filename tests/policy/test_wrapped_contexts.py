"""Selective contexts that a context of the user's own enters are what they are when the engine enters them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import distckpt as dc

aten = torch.ops.aten
SAVED = [
    aten.mm.default,
    aten.sin.default,
    aten.randn_like.default,
    aten.addmm.default,
    aten._to_copy.default,
]


@contextlib.contextmanager
def as_generator(inner: Any) -> Iterator[None]:
    with inner:
        yield


class AsClass:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.inner.__exit__(*exception)


def wrapped(wrap: Any) -> Callable[[], Any]:
    return lambda: tuple(map(wrap, dc.create_selective_checkpoint_contexts(SAVED)))


WRAPS = pytest.mark.parametrize("wrap", [as_generator, AsClass])


def draws(x: torch.Tensor) -> torch.Tensor:
    y = (x * torch.randn_like(x)).sin()
    return (torch.nn.functional.dropout(y, 0.5) @ x).sin().exp()


def takes_a_gradient(x: torch.Tensor) -> torch.Tensor:
    y = (x @ x).sin()
    (g,) = torch.autograd.grad(dc.checkpoint(torch.exp, y @ y).sum(), y, create_graph=True)
    return (g @ x).sin()


def casts(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x @ x.sin()).float().tanh()


PROGRAMS = pytest.mark.parametrize("fn", [draws, takes_a_gradient, casts])


def gradients(fn: Any, call: Callable[..., Any], times: int = 2) -> list[torch.Tensor]:
    """Of as many backwards, a double backward, and where the generator is left."""
    torch.manual_seed(0)
    x = torch.randn(4, 4, requires_grad=True)
    out = call(fn, x).sum()
    found = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(times)]
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    return [*found, *torch.autograd.grad(first.sin().sum(), x), torch.rand(2)]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@WRAPS
@PROGRAMS
def test_a_selective_context_inside_the_users_own_is_exact_in_every_backward(fn: Any, wrap: Any) -> None:
    found = gradients(fn, functools.partial(dc.checkpoint, context_fn=wrapped(wrap)))
    assert equal(found, gradients(fn, lambda fn, x: fn(x)))


@WRAPS
@PROGRAMS
def test_one_wrapped_pair_may_serve_regions_that_lie_in_each_other(fn: Any, wrap: Any) -> None:
    pair = dc.create_selective_checkpoint_contexts(SAVED)
    region = functools.partial(dc.checkpoint, context_fn=lambda: tuple(map(wrap, pair)))
    found = gradients(lambda x: region(fn, region(fn, x) @ x), region)
    assert equal(found, gradients(lambda x: fn(fn(x) @ x), lambda fn, x: fn(x)))


@WRAPS
def test_a_saved_operator_in_a_wrapped_context_runs_once(wrap: Any) -> None:
    calls = torch.zeros(())

    def count(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).sin().exp()

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.sin.default:
                calls.add_(1)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 4, requires_grad=True)
    with Counts():
        dc.checkpoint(count, x, context_fn=wrapped(wrap)).sum().backward()
    assert calls == 1


@WRAPS
def test_a_kept_output_that_was_changed_is_refused_in_a_wrapped_context_too(wrap: Any) -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        y = x @ x
        y.add_(1)
        return y.sin().exp()

    with pytest.raises(dc.errors.SavedOutputChanged, match="DC121"):
        dc.checkpoint(
            change, torch.randn(4, 4, requires_grad=True), context_fn=wrapped(wrap)
        ).sum().backward()


@pytest.mark.parametrize("wrong", [lambda: (1, contextlib.nullcontext()), lambda: (AsClass, AsClass)])
def test_what_is_no_context_manager_is_a_type_error_and_the_next_region_works(wrong: Any) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(TypeError, match="context manager protocol"):
        dc.checkpoint(draws, x, context_fn=wrong)
    assert equal(gradients(draws, dc.checkpoint), gradients(draws, lambda fn, x: fn(x)))
