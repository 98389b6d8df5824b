"""Generators that nobody registered, met in the call of a region: it draws the same again, and they move once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt import compat
from distckpt.engine.rng import Stash
from distckpt.engine.streams import GeneratorStream

from .exact import Region, exact, leaf, plain

Call = Callable[[Region, torch.Tensor, torch.Generator], torch.Tensor]
shared = torch.Generator()


def noisy(t: torch.Tensor, source: Any) -> torch.Tensor:
    return (t * torch.rand(6, generator=source)).sin() + torch.rand(6, generator=source)


def reads_global(t: torch.Tensor) -> torch.Tensor:
    return noisy(t, shared)


def by_helper(t: torch.Tensor) -> torch.Tensor:
    return reads_global(t).exp()


def positional(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(noisy, x, g)


def keyword(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, *, generator: noisy(t, generator), x, generator=g)


def in_containers(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, c: noisy(t, c["one"][0]), x, {"one": (g,)})


def in_a_partial(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(functools.partial(noisy, source=g), x)


def in_a_cell(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t: noisy(t, g), x)


def in_a_default(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, source=g: noisy(t, source), x)


def in_a_function_that_is_passed(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, fn: fn(t), x, lambda t: noisy(t, g))


def as_a_global(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    shared.set_state(g.get_state())
    out = region(reads_global, x)
    g.set_state(shared.get_state())
    return out


def as_a_global_of_a_helper(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    shared.set_state(g.get_state())
    out = region(by_helper, x)
    g.set_state(shared.get_state())
    return out


def twice(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, a, b: noisy(noisy(t, a), b), x, g, g)


def reseeded(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    def fn(t: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        source.manual_seed(4)
        return noisy(t, source)

    return region(fn, x, g)


def nested(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    def outer(t: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        return F.dropout(region(noisy, noisy(t, source).sin(), source), 0.5).exp() * t

    return region(outer, x, g)


def gradient_inside(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    def fn(t: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        mid = noisy(t, source)
        (slope,) = torch.autograd.grad(mid.sum(), t, create_graph=True)
        return (mid * slope).sin() * torch.rand(6, generator=source)

    return region(fn, x, g)


def default_and_own(region: Region, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return region(lambda t, a, b: F.dropout(noisy(noisy(t, a), b), 0.5), x, torch.default_generator, g)


CALLS = [
    positional,
    keyword,
    in_containers,
    in_a_partial,
    in_a_cell,
    in_a_default,
    in_a_function_that_is_passed,
    as_a_global,
    as_a_global_of_a_helper,
    twice,
    reseeded,
    nested,
    gradient_inside,
    default_and_own,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"early_stop": False}, {"determinism_check": "bitwise"}, {"determinism_check": "fingerprint"}],
    ids=str,
)
def test_a_generator_in_the_call_draws_the_same_in_the_replay_and_moves_once(
    call: Call, options: dict[str, Any]
) -> None:
    def program(region: Region) -> Any:
        g = torch.Generator().manual_seed(3)
        x = leaf(6)
        outs = [call(region, x, g), call(region, x, g)]
        torch.rand(2, generator=g)
        between = g.get_state()
        grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in reversed(outs * 2)]
        return [*outs, *grads, between, g.get_state(), torch.rand(3, generator=g)]

    exact(program, **options)


def test_a_generator_in_the_call_is_exact_in_a_selective_region() -> None:
    context = functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def program(region: Region) -> Any:
        g = torch.Generator().manual_seed(3)
        x = leaf(6, 6)
        norm = torch.nn.BatchNorm1d(6)

        def inner(t: torch.Tensor) -> torch.Tensor:
            mid = F.rrelu(norm(t), training=True)
            (slope,) = torch.autograd.grad(mid.sum(), t, create_graph=True)
            return mid * slope

        def outer(t: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
            noise = torch.rand(6, 6, generator=generator)
            return inside(inner, (t @ t * noise).sin()) * torch.rand(6, 6, generator=generator)

        inside = region if region is plain else dc.checkpoint
        out = region(outer, x, generator=g)
        out.sum().backward()
        return out, x.grad, g.get_state(), norm.running_mean

    exact(program, context_fn=context)


def test_a_reentrant_region_draws_the_same_from_a_generator_it_is_passed() -> None:
    def program(region: Region) -> Any:
        g = torch.Generator().manual_seed(3)
        x = leaf(6)
        out = region(noisy, x, g)
        out.sum().backward()
        return out, x.grad, g.get_state()

    exact(program, use_reentrant=True)


def test_a_generator_in_the_call_is_left_alone_without_preserve_rng_state() -> None:
    g = torch.Generator().manual_seed(3)
    x = leaf(6)
    out = dc.checkpoint(noisy, x, g, preserve_rng_state=False)
    before = g.get_state()
    out.sum().backward()
    assert not torch.equal(before, g.get_state())


def test_a_generator_in_the_call_draws_anew_in_compat_as_with_torch() -> None:
    def end(region: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(3)
        x = leaf(6)
        region(noisy, x, g, use_reentrant=False).sum().backward()
        return g.get_state()

    assert torch.equal(end(compat.checkpoint), end(torch.utils.checkpoint.checkpoint))


def test_a_registered_generator_and_the_default_one_are_not_stashed_again() -> None:
    g = torch.Generator()
    with dc.rng.register("router", g):
        stash = Stash((), (), [g, torch.default_generator])
    assert [s.name for s, _ in stash.own] == ["router"]
    assert len(Stash((), (), [g, g]).own) == 1


def test_a_call_without_generators_makes_no_stash(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(GeneratorStream, "__init__", lambda *_: made.append(1))
    monkeypatch.setattr(Stash, "__init__", lambda *_: made.append(1))
    x = leaf(6)
    dc.checkpoint(lambda t: F.dropout(t.sin(), 0.5), x).sum().backward()
    assert not made
