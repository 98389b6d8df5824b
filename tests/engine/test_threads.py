"""Threads: several backwards on one graph, and regions on several threads at once."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc

from .exact import Region, leaf, plain, same_bits


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run every job on a thread of its own, started at once; re-raises the first error."""
    barrier = threading.Barrier(len(jobs))
    results: list[Any] = [None] * len(jobs)

    def run(i: int, job: Callable[[], Any]) -> None:
        barrier.wait(20)
        try:
            results[i] = job()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("in_session", [False, True])
def test_several_threads_running_backward_on_one_graph_are_exact(in_session: bool) -> None:
    x, w = leaf(16, 16), leaf(16, 16, seed=2)

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (F.relu(a @ b).sin() @ b).exp().sin()

    want = torch.autograd.grad(fn(x, w).sum(), (x, w))
    for _ in range(10):
        s = dc.session()
        if in_session:
            with s:
                out = dc.checkpoint(fn, x, w).sum()
        else:
            out = dc.checkpoint(fn, x, w).sum()

        def job(out: torch.Tensor = out) -> Any:
            return torch.autograd.grad(out, (x, w), retain_graph=True)

        for grads in together(*[job] * 4):
            assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_threads_that_record_and_replay_their_own_regions_do_not_meet() -> None:
    def job(seed: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            x = leaf(16, seed=seed)
            for _ in range(20):
                assert not dc.is_recomputing()
                out = dc.checkpoint(lambda t: dc.checkpoint(lambda u: u.sin() * u, t).exp(), x)
                out.sum().backward()
            return x.grad

        return run

    found = together(*(job(seed) for seed in range(4)))
    for seed, grad in enumerate(found):
        x = leaf(16, seed=seed)
        for _ in range(20):
            (x.sin() * x).exp().sum().backward()
        assert torch.equal(grad, x.grad)


def test_a_region_recorded_on_one_thread_is_replayed_by_another() -> None:
    x = leaf(16)
    [out] = together(lambda: dc.checkpoint(lambda t: t.sin().exp(), x).sum())
    out.backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_the_switches_of_one_thread_are_not_seen_by_another() -> None:
    """Torch's early-stop and debug switches are process globals."""
    ran: list[str] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        t = t.sin().exp()
        ran.append("tail")
        return t + 1

    def job() -> None:
        dc.checkpoint(fn, leaf(4)).sum().backward()

    with dc.set_checkpoint_early_stop(False):
        together(job)
    assert ran == ["tail"]


def test_a_rule_of_one_thread_is_not_seen_by_another() -> None:
    from distckpt.engine.rng import current_rule

    with dc.devices.rule("all"):
        assert together(lambda: current_rule("error")) == ["error"]


def test_a_session_released_while_another_thread_uses_its_values_leaves_exact_gradients() -> None:
    x = leaf(64)
    want = torch.autograd.grad(x.sin().exp().sin().sum(), x)[0]
    for _ in range(20):
        with dc.session() as s:
            out = dc.checkpoint(lambda t: t.sin().exp().sin(), x).sum()
        s.replay()

        def use(out: torch.Tensor = out) -> torch.Tensor:
            return torch.autograd.grad(out, x, retain_graph=True)[0]

        grads = together(use, s.release, use)
        assert torch.equal(grads[0], want)
        assert torch.equal(grads[2], want)


def test_context_variables_travel_to_a_replay_on_another_thread() -> None:
    from contextvars import ContextVar

    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    seen: list[str] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append(tenant.get())
        return t.sin().exp()

    token = tenant.set("somebody")
    out = dc.checkpoint(fn, leaf(4)).sum()
    tenant.reset(token)
    together(out.backward)
    assert seen == ["somebody", "somebody"]


class Interleaved:
    """Two replays on two threads, the second of which comes in the middle of the first and lets it finish."""

    def __init__(self) -> None:
        self.inside = [threading.Event(), threading.Event()]
        self.first_is_done = threading.Event()

    def meet(self, me: int) -> None:
        """In the middle of replay ``me``: wait for the other one, which waits for its turn if it must."""
        self.inside[me].set()
        (self.first_is_done if me else self.inside[1]).wait(0.5)

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
        """What both return."""

        def run_first() -> Any:
            try:
                return first()
            finally:
                self.first_is_done.set()

        def run_second() -> Any:
            assert self.inside[0].wait(20)
            return second()

        return together(run_first, run_second)


def drop(t: torch.Tensor) -> torch.Tensor:
    return F.dropout(t.sin(), 0.5) * F.dropout(t, 0.5)


@pytest.mark.parametrize("shared", ["default generator", "registered generator"])
def test_replays_that_draw_from_one_generator_on_two_threads_take_turns(shared: str) -> None:
    """The second replay comes between two draws of the first, and lets it finish; without turns the second draw of
    the first is one of the second's."""
    own = torch.Generator().manual_seed(3) if shared == "registered generator" else None
    turns = Interleaved()

    def fn(me: int, t: torch.Tensor) -> torch.Tensor:
        t = t.sin() * (torch.rand(64, generator=own) > 0.5)
        if dc.is_recomputing():
            turns.meet(me)
        return t.sin() * (torch.rand(64, generator=own) > 0.5)

    def program(region: Region, both: Callable[..., Any]) -> list[Any]:
        torch.manual_seed(0)
        xs = [leaf(64, seed=i) for i in range(2)]
        outs = [region(functools.partial(fn, i), x).sum() for i, x in enumerate(xs)]
        grads = [functools.partial(torch.autograd.grad, o, x) for o, x in zip(outs, xs, strict=True)]
        return [*(g for (g,) in both(*grads)), torch.rand(3, generator=own)]

    with dc.rng.register("own", own) if own is not None else contextlib.nullcontext():
        want = program(plain, lambda *jobs: [job() for job in jobs])
        if own is not None:
            own.manual_seed(3)
        found = program(dc.checkpoint, turns.run)
    assert all(map(same_bits, want, found))
    assert all(event.is_set() for event in turns.inside)


def test_replays_that_rewind_the_buffers_of_one_module_on_two_threads_take_turns() -> None:
    """The second replay comes while the first has the buffers rewound, and lets it put them back."""
    turns = Interleaved()

    def program(region: Region, both: Callable[..., Any]) -> list[Any]:
        norm = torch.nn.BatchNorm1d(4)

        def fn(me: int, t: torch.Tensor) -> torch.Tensor:
            t = norm(t.sin())
            if dc.is_recomputing():
                turns.meet(me)
            return t.sin()

        xs = [leaf(8, 4, seed=i) for i in range(2)]
        outs = [region(functools.partial(fn, i), x).sum() for i, x in enumerate(xs)]
        grads = [functools.partial(torch.autograd.grad, o, x) for o, x in zip(outs, xs, strict=True)]
        return [*(g for (g,) in both(*grads)), *norm.buffers()]

    want = program(plain, lambda *jobs: [job() for job in jobs])
    assert all(map(same_bits, want, program(dc.checkpoint, turns.run)))
    assert all(event.is_set() for event in turns.inside)


def test_replays_that_draw_from_different_generators_do_not_wait_for_each_other() -> None:
    """A rank per thread, each with its generator, may wait for the others in the middle of a region."""
    meeting = threading.Barrier(2)

    def job(i: int) -> Callable[[], Any]:
        own = torch.Generator().manual_seed(i)

        def fn(t: torch.Tensor) -> torch.Tensor:
            t = t.sin() * torch.rand(8, generator=own)
            if dc.is_recomputing():
                meeting.wait(20)  # broken, and an error, if only one of the two can get here
            return t.sin()

        with dc.rng.register(f"rank {i}", own):
            out = dc.checkpoint(fn, leaf(8)).sum()
        return out.backward

    together(job(0), job(1))


def test_a_replay_on_another_thread_of_a_backward_inside_a_replay_does_not_wait_for_it() -> None:
    """Gradients nested more than 60 deep: autograd changes threads, and each of these replays draws."""
    threads: set[int] = set()
    found: dict[int, list[float]] = {}
    calls: collections.Counter[int] = collections.Counter()

    def block(t: torch.Tensor, then: Callable[[], None] = lambda: None) -> torch.Tensor:
        t = F.dropout(t, 0.5).sin()
        then()
        return F.dropout(t, 0.5).sin()

    def nested(depth: int, t: torch.Tensor) -> torch.Tensor:
        calls[depth] += 1
        return block(t, functools.partial(deeper, depth) if calls[depth] == 2 and depth else lambda: None)

    def deeper(depth: int) -> None:  # inside a replay
        threads.add(threading.get_ident())
        with torch.random.fork_rng():
            found[depth - 1] = gradient(dc.checkpoint, functools.partial(nested, depth - 1), depth - 1)

    def gradient(region: Region, fn: Any, seed: int) -> list[float]:
        torch.manual_seed(seed)
        x = leaf(8)
        (grad,) = torch.autograd.grad(region(fn, x).sum(), x)
        return [*grad.tolist(), *torch.rand(3).tolist()]

    [found[70]] = together(lambda: gradient(dc.checkpoint, functools.partial(nested, 70), 70))
    assert found == {depth: gradient(plain, block, depth) for depth in range(71)}
    assert len(threads) > 1


def test_a_thread_that_has_a_turn_does_not_wait_for_a_region_that_waits_for_that_turn() -> None:
    """Two threads whose regions take gradients through earlier ones, in opposite order of what they wait for."""
    first_inside, second_inside = threading.Event(), threading.Event()
    y = leaf(8)
    x = dc.checkpoint(drop, y).sum()

    def through_x(t: torch.Tensor) -> torch.Tensor:  # draws nothing; its replay replays `x`, which draws
        if dc.is_recomputing():
            second_inside.set()
            first_inside.wait(2)
        return t.sin() * torch.autograd.grad(x, y, retain_graph=True)[0]

    n_in = leaf(8, seed=2)
    n = dc.checkpoint(through_x, n_in).sum()

    def through_n(t: torch.Tensor) -> torch.Tensor:
        t = F.dropout(t, 0.5)
        if dc.is_recomputing():
            first_inside.set()
            second_inside.wait(2)
        return t.sin() * torch.autograd.grad(n, n_in, retain_graph=True)[0]

    o_in = leaf(8, seed=3)
    torch.manual_seed(0)
    o = dc.checkpoint(through_n, o_in).sum()
    found = together(
        lambda: torch.autograd.grad(o, o_in), lambda: torch.autograd.grad(n, n_in, retain_graph=True)
    )
    torch.manual_seed(0)
    want = torch.autograd.grad(through_n(o_in).sum(), o_in)
    assert torch.equal(found[0][0], want[0])
    assert torch.equal(found[1][0], torch.autograd.grad(n, n_in)[0])
