"""Threads: several backwards on one graph, and regions on several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc

from .exact import leaf


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
    from distckpt.engine.devices import current_rule

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
