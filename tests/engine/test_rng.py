"""Random state: a replay draws what its forward drew, and leaves every generator where it found it."""

from __future__ import annotations

import functools
import random
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.engine import rng
from distckpt.errors import DrawMismatch, StreamError, ValueMismatch

from .exact import Region, exact, leaf, plain, same_bits


def drop(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.sin(), 0.5) * x


def test_dropout_in_a_replay_draws_the_forward_mask() -> None:
    def program(region: Region) -> Any:
        x = leaf(64)
        out = region(drop, x)
        torch.rand(7)  # the generator is elsewhere by the time of the replay
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_every_backward_of_a_retained_graph_draws_the_forward_mask() -> None:
    def program(region: Region) -> Any:
        x = leaf(64)
        out = region(drop, x).sum()
        grads = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(3)]
        return (*grads, torch.rand(2))

    exact(program)


def test_regions_in_sequence_and_nested_each_draw_their_own_masks() -> None:
    def program(region: Region) -> Any:
        x = leaf(64)

        def outer(y: torch.Tensor) -> torch.Tensor:
            return F.dropout(region(drop, F.dropout(y, 0.3)), 0.2) * y

        out = region(outer, region(drop, x))
        out.sum().backward()
        return out, x.grad

    assert exact(program).regions == 4  # one of the inner region's two records is in the replay


def test_a_region_that_draws_nothing_keeps_and_restores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    real = rng.rewind
    monkeypatch.setattr(rng, "rewind", lambda draws: restored.append(draws) or real(draws))
    x = leaf(8)
    dc.checkpoint(lambda t: t.sin().exp(), x).sum().backward()
    assert restored == []
    dc.checkpoint(drop, x).sum().backward()
    assert len(restored) == 1


def test_preserve_rng_state_false_draws_anew_and_moves_the_generator() -> None:
    x = leaf(512)
    out = dc.checkpoint(drop, x, preserve_rng_state=False)
    before = torch.get_rng_state()
    out.sum().backward()
    assert not torch.equal(before, torch.get_rng_state())


def test_a_registered_generator_draws_the_same_in_the_replay_and_moves_once() -> None:
    def program(region: Region) -> Any:
        router = torch.Generator().manual_seed(3)
        with dc.rng.register("router", router):
            x = leaf(64)
            out = region(lambda t: t.sin() * t * (torch.rand(64, generator=router) > 0.5), x)
            out.sum().backward()
        return out, x.grad, torch.rand(3, generator=router)

    exact(program)


def test_python_random_draws_the_same_in_the_replay_once_registered() -> None:
    def program(region: Region) -> Any:
        random.seed(5)
        with dc.rng.register_source("python", random.getstate, random.setstate):
            x = leaf(8)
            out = region(lambda t: (t * random.random()).sin() * random.random(), x)
            random.random()
            out.sum().backward()
        return out, x.grad, torch.tensor(random.random())

    exact(program)


def test_numpy_random_draws_the_same_in_the_replay_once_registered() -> None:
    np = pytest.importorskip("numpy")

    def program(region: Region) -> Any:
        np.random.seed(5)
        with dc.rng.register_source("numpy", np.random.get_state, np.random.set_state):
            x = leaf(8)
            out = region(lambda t: (t * float(np.random.rand())).sin() * float(np.random.rand()), x)
            np.random.rand()
            out.sum().backward()
        return out, x.grad, torch.tensor(float(np.random.rand()))

    exact(program)


def test_a_numpy_generator_object_draws_the_same_in_the_replay_once_registered() -> None:
    np = pytest.importorskip("numpy")

    def program(region: Region) -> Any:
        source = np.random.default_rng(5)
        bits = source.bit_generator
        with dc.rng.register_source("sampler", lambda: bits.state, lambda s: setattr(bits, "state", s)):
            x = leaf(8)
            out = region(lambda t: (t * float(source.random())).sin(), x)
            out.sum().backward()
        return out, x.grad, torch.tensor(float(source.random()))

    exact(program)


@pytest.mark.parametrize("name", ["numpy", "python"])
def test_a_source_registered_by_its_name_alone_draws_the_same_in_the_replay(name: str) -> None:
    if name == "numpy":
        library: Any = pytest.importorskip("numpy").random
        draw = library.rand
    else:
        library, draw = random, random.random

    def program(region: Region) -> Any:
        library.seed(5)
        with dc.rng.register_source(name):
            x = leaf(8)
            out = region(lambda t: (t * float(draw())).sin() * float(draw()), x)
            draw()
            out.sum().backward()
        return out, x.grad, torch.tensor(float(draw()))

    exact(program)


def test_a_name_that_says_nothing_alone_is_refused_with_those_that_do() -> None:
    with pytest.raises(StreamError, match="'numpy' and 'python'"):
        dc.rng.register_source("jax")


def test_python_random_that_is_not_registered_is_found_by_the_value_checks() -> None:
    x = leaf(64)
    for level in ("fingerprint", "bitwise"):
        out = dc.checkpoint(lambda t: (t * random.random()).sin(), x, determinism_check=level)
        with pytest.raises(ValueMismatch) as caught:
            out.sum().backward()
        assert caught.value.code == "DC103"


def test_a_stream_registered_twice_under_one_name_is_refused() -> None:
    with dc.rng.register("router", torch.Generator()):
        with pytest.raises(StreamError) as caught:
            dc.rng.register("router", torch.Generator())
    assert caught.value.code == "DC116"
    with dc.rng.register("router", torch.Generator()):
        pass  # free again


def test_what_is_not_a_generator_or_a_pair_of_callables_is_refused() -> None:
    with pytest.raises(StreamError):
        dc.rng.register("x", random)  # type: ignore[arg-type]
    with pytest.raises(StreamError):
        dc.rng.register_source("x", random.getstate, None)  # type: ignore[arg-type]


def test_removing_a_registration_twice_is_harmless() -> None:
    registration = dc.rng.register("router", torch.Generator())
    registration.remove()
    registration.remove()
    assert dc.rng.registered() == ()


def test_a_region_recorded_before_a_stream_was_removed_still_replays_it() -> None:
    def program(region: Region) -> Any:
        router = torch.Generator().manual_seed(3)
        x = leaf(64)
        with dc.rng.register("router", router):
            out = region(lambda t: (t * torch.rand(64, generator=router)).sin(), x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_a_replay_that_draws_another_number_of_values_is_refused() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        count = 3 if dc.is_recomputing() else 2
        return t.sin() + sum(float(torch.rand(())) for _ in range(count))

    out = dc.checkpoint(fn, leaf(4), early_stop=False)
    with pytest.raises(DrawMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC104"
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_noise_of_a_last_rrelu_is_filled_before_it_is_used(early_stop: bool) -> None:
    """RReLU hands its noise to the saved-tensor hook before the kernel fills it (pytorch#193671)."""

    def program(region: Region) -> Any:
        x = leaf(256)
        out = region(lambda t: F.rrelu(t, training=True), x)
        out.sum().backward()
        return out, x.grad

    exact(program, early_stop=early_stop)


def test_a_last_rrelu_after_other_draws_is_exact_in_every_backward() -> None:
    def program(region: Region) -> Any:
        x = leaf(256)
        out = region(lambda t: F.rrelu(F.dropout(t, 0.2).exp() - 1.5, training=True), x).sum()
        return [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]

    exact(program)


def test_the_generator_is_where_it_was_after_a_replay_that_failed() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        t = F.dropout(t, 0.5)
        return t.sin().exp() if dc.is_recomputing() else t.sin()

    out = dc.checkpoint(fn, leaf(16), early_stop=False)
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(dc.CheckpointError):
        out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_gradient_taken_inside_a_region_draws_the_forward_mask() -> None:
    def program(region: Region) -> Any:
        x = leaf(64)

        def fn(t: torch.Tensor) -> torch.Tensor:
            inner = region(drop, t)
            (g,) = torch.autograd.grad(inner.sum(), t, create_graph=True)
            return F.dropout(g * t, 0.5).sin()

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def seeds_itself(t: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    return (t * torch.rand(6)).sin() + torch.rand(6)


def forks(t: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        t = (t * torch.rand(6)).sin()
        torch.rand(3)
    return t + 1


def puts_back(t: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    t = (t * torch.rand(6)).sin()
    torch.rand(3)
    torch.set_rng_state(state)
    return t + 1


@pytest.mark.parametrize("fn", [seeds_itself, forks, puts_back])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("engine", ["dc", "compat"])
def test_a_region_that_seeds_itself_or_puts_the_state_back_leaves_the_generator_as_plain_autograd_does(
    fn: Any, order: int, engine: str
) -> None:
    """Its record ends in the state that it began with, as if it had drawn nothing; the replay stops half way."""

    def program(region: Region) -> Any:
        x = leaf(6)
        options = {"use_reentrant": False} if engine == "compat" and region is not plain else {}
        outs = [region(fn, x, **options) for _ in range(2)]
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in outs[::order]]
        return [*outs, *grads, torch.rand(3)]

    torch.manual_seed(0)
    want = program(plain)
    torch.manual_seed(0)
    found = program(dc.checkpoint if engine == "dc" else dc.compat.checkpoint)
    assert all(map(same_bits, want, found))


def test_a_registered_generator_that_a_region_puts_back_is_where_plain_autograd_leaves_it() -> None:
    def program(region: Region) -> Any:
        router = torch.Generator().manual_seed(3)

        def fn(t: torch.Tensor) -> torch.Tensor:
            router.manual_seed(4)
            return (t * torch.rand(6, generator=router)).sin() + torch.rand(6, generator=router)

        with dc.rng.register("router", router):
            x = leaf(6)
            outs = [region(fn, x) for _ in range(2)]
            grads = [torch.autograd.grad(out.sum(), x)[0] for out in reversed(outs)]
        return [*outs, *grads, torch.rand(3, generator=router)]

    exact(program)


class OnlyOnce(torch.nn.Module):
    """A parameter made in the first forward, as lazy modules do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "weight"):
            self.weight = torch.nn.Parameter(torch.randn(6))
        return (x * self.weight).sin()


def lazy_layer() -> Any:
    return torch.nn.LazyLinear(6)


def cached_mask() -> Any:
    mask = functools.cache(lambda n: torch.rand(n))
    return lambda x: (x * mask(6)).sin()


@pytest.mark.parametrize("make", [lazy_layer, OnlyOnce, cached_mask])
def test_a_replay_that_draws_fewer_numbers_than_the_forward_is_refused_under_early_stop(make: Any) -> None:
    first = make()
    out = dc.checkpoint(lambda x: F.dropout(first(x), 0.5) * x, leaf(4, 6))
    after = torch.get_rng_state()
    with pytest.raises(DrawMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC104"
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("make", [lazy_layer, OnlyOnce, cached_mask])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_replay_that_draws_nothing_is_exact_although_the_forward_drew(make: Any, early_stop: bool) -> None:
    def program(region: Region) -> Any:
        first = make()
        x = leaf(4, 6)
        out = region(lambda t: first(t).sin() * t, x)
        out.sum().backward()
        return out, x.grad

    exact(program, early_stop=early_stop)


def test_a_replay_that_draws_although_the_forward_did_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_alone", lambda: True)  # the test runner may have threads of its own
    kept = torch.ones(6)
    out = dc.checkpoint(lambda x: (x * (torch.rand(6) if dc.is_recomputing() else kept)).sin(), leaf(6))
    before = torch.get_rng_state()
    with pytest.raises(DrawMismatch):
        out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_draw_of_another_thread_during_a_replay_that_draws_nothing_is_neither_refused_nor_undone() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        t = t.sin()
        if dc.is_recomputing():
            other = threading.Thread(target=drawn.append, args=(torch.rand(3),))
            other.start()
            other.join()
        return t.exp().sin()

    drawn: list[torch.Tensor] = []
    x = leaf(6)
    torch.manual_seed(0)
    want = torch.rand(5)
    torch.manual_seed(0)
    stay = threading.Event()
    another = threading.Thread(target=stay.wait)
    another.start()
    try:
        dc.checkpoint(fn, x).sum().backward()
    finally:
        stay.set()
        another.join()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sin().sum(), x)[0])
    assert torch.equal(torch.cat([drawn[0], torch.rand(2)]), want)


def draws_after_the_last_save(t: torch.Tensor) -> torch.Tensor:
    t = F.dropout(t, 0.5).sin()
    return t + torch.rand(64)


def draws_in_a_dead_tail(t: torch.Tensor) -> torch.Tensor:
    t = F.dropout(t, 0.5).sin()
    F.dropout(t.detach().requires_grad_(), 0.5).exp()  # its graph is gone at once
    return t


@pytest.mark.parametrize("fn", [draws_after_the_last_save, draws_in_a_dead_tail])
@pytest.mark.parametrize("early_stop", [True, False])
def test_draws_behind_the_last_value_that_is_needed_are_no_mismatch(fn: Any, early_stop: bool) -> None:
    def program(region: Region) -> Any:
        x = leaf(64)
        out = region(fn, x).sum()
        grads = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]
        return [*grads, torch.rand(3)]

    exact(program, early_stop=early_stop)


def test_a_region_without_random_operators_after_one_with_them_reuses_its_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading 5 KB of CPU state for every region would be paid by regions that draw nothing."""
    reads = 0
    real = rng.cpu_stash

    def count(device: Any) -> Any:
        nonlocal reads
        reads += 1
        return real(device)

    monkeypatch.setattr(rng, "cpu_stash", count)
    x = leaf(8)
    out = dc.checkpoint(drop, x)
    first = reads
    for _ in range(3):
        out = dc.checkpoint(torch.sin, out)
    assert reads == first
