"""Sessions: consumers of recomputed values that share one replay."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.engine.hooks import fill
from distckpt.engine.stats import counters
from distckpt.errors import SessionError

from .exact import counted, exact, leaf


def work(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.dropout((x @ w).sin(), 0.2) @ w


def setup() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return leaf(4, 4), leaf(4, 4, seed=2)


def plain_grads() -> tuple[torch.Tensor, ...]:
    x, w = setup()
    return torch.autograd.grad(work(x, w).sum(), (x, w))


def test_the_two_halves_of_a_split_backward_share_one_replay() -> None:
    x, w = setup()
    with dc.session() as s:
        out = dc.checkpoint(work, x, w).sum()

    def halves() -> Any:
        (dx,) = torch.autograd.grad(out, x, retain_graph=True)
        (dw,) = torch.autograd.grad(out, w)
        return dx, dw

    grads, counts = counted(halves)
    s.release()
    assert counts.replays == 1
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads(), strict=True))


def test_without_a_session_each_half_replays_for_itself() -> None:
    x, w = setup()
    out = dc.checkpoint(work, x, w).sum()
    _, counts = counted(lambda: (torch.autograd.grad(out, x, retain_graph=True), torch.autograd.grad(out, w)))
    assert counts.replays == 2


def test_a_session_around_the_consumers_only_shares_their_replay() -> None:
    x, w = setup()
    out = dc.checkpoint(work, x, w).sum()
    with dc.session() as s:
        _, counts = counted(lambda: [torch.autograd.grad(out, (x, w), retain_graph=True) for _ in range(4)])
    s.release()
    assert counts.replays == 1


def test_a_replay_can_be_fired_before_the_gradient_arrives() -> None:
    x, w = setup()
    with dc.session() as s:
        out = dc.checkpoint(work, x, w).sum()
    torch.rand(3)  # the generator is elsewhere
    assert s.replay() == 1
    assert s.replay() == 0  # nothing is missing any more
    grads, counts = counted(lambda: torch.autograd.grad(out, (x, w)))
    assert counts.replays == 0
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads(), strict=True))
    s.release()


def test_a_fired_replay_of_nested_regions_covers_what_it_can() -> None:
    x, w = setup()
    want = torch.autograd.grad(work(work(x, w), w).sum(), (x, w))
    torch.manual_seed(0)
    with dc.session() as s:
        out = dc.checkpoint(lambda a, b: dc.checkpoint(work, dc.checkpoint(work, a, b), b), x, w).sum()
    s.replay()
    grads, counts = counted(lambda: torch.autograd.grad(out, (x, w)))
    assert counts.replays == 0
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    s.release()


def test_released_values_are_freed_and_a_later_use_replays_again() -> None:
    x, w = setup()
    refs: list[weakref.ref[torch.Tensor]] = []

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = work(a, b)
        refs.append(weakref.ref(y))
        return y.sin()

    with dc.session() as s:
        out = dc.checkpoint(fn, x, w).sum()
    s.replay()
    assert refs[1]() is not None
    s.release()
    assert refs[1]() is None
    _, counts = counted(lambda: out.backward())
    assert counts.replays == 1


def test_values_of_a_session_die_with_their_part_of_the_graph() -> None:
    x, w = setup()
    refs: list[weakref.ref[torch.Tensor]] = []

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = work(a, b)
        refs.append(weakref.ref(y))
        return y.sin()

    with dc.session():
        out = dc.checkpoint(fn, x, w).sum()
        out.backward()
        assert refs[1]() is None


def test_a_session_may_be_entered_many_times_and_nested_in_another() -> None:
    x, w = setup()
    one, two = dc.session(), dc.session()
    with one:
        a = dc.checkpoint(work, x, w)
        with two:
            b = dc.checkpoint(work, x, w)
        c = dc.checkpoint(work, x, w)
    with one:
        d = dc.checkpoint(work, x, w)
    assert (two.replay(), one.replay()) == (1, 3)
    _, counts = counted(lambda: (a + b + c + d).sum().backward())
    assert counts.replays == 0
    one.release(), two.release()


def test_a_session_left_by_an_exception_is_left() -> None:
    x, w = setup()
    with pytest.raises(KeyError), dc.session() as s:
        raise KeyError
    out = dc.checkpoint(work, x, w).sum()
    assert s.replay() == 0
    out.backward()


def test_a_released_session_can_do_nothing_more() -> None:
    s = dc.session()
    s.release()
    for use in (s.replay, s.release, s.__enter__):
        with pytest.raises(SessionError) as caught:
            use()
        assert caught.value.code == "DC115"
    out = dc.checkpoint(work, *setup()).sum()
    out.backward()


def test_a_session_does_not_keep_a_dropped_graph_alive() -> None:
    x, w = setup()
    y = x * 1.0
    ref = weakref.ref(y)
    gc.disable()
    try:
        with dc.session() as s:
            out = dc.checkpoint(work, y, w)
        del y, out
        assert ref() is None
        assert s.replay() == 0
    finally:
        gc.enable()


def test_micro_batches_in_sessions_of_their_own_are_exact() -> None:
    def program(region: Any) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        sessions = [dc.session() for _ in range(3)]
        outs = []
        for s in sessions:
            with s:
                outs.append(region(work, x, w).sum())
        grads = []
        for s, out in zip(reversed(sessions), reversed(outs), strict=True):
            s.replay()
            grads += torch.autograd.grad(out, (x,), retain_graph=True)
            grads += torch.autograd.grad(out, (w,))
            s.release()
        return grads

    assert exact(program).replays == 3


def test_a_failed_replay_of_a_session_raises_and_leaves_no_values() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        return t.sin()[: 2 if dc.is_recomputing() else 3].exp()

    with dc.session() as s:
        out = dc.checkpoint(fn, leaf(4))
    with pytest.raises(dc.CheckpointError):
        s.replay()
    with pytest.raises(dc.CheckpointError):
        out.sum().backward()
    s.release()


def test_double_backward_inside_a_session_is_exact() -> None:
    x, w = setup()
    (g,) = torch.autograd.grad(work(x, w).sum(), x, create_graph=True)
    want = torch.autograd.grad(g.pow(2).sum(), (x, w))
    x, w = setup()
    with dc.session() as s:
        out = dc.checkpoint(work, x, w)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        found = torch.autograd.grad(g.pow(2).sum(), (x, w))
    s.release()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_counters_only_ever_grow() -> None:
    before = (counters.regions, counters.replays)
    dc.checkpoint(work, *setup()).sum().backward()
    assert (counters.regions, counters.replays) == (before[0] + 1, before[1] + 1)


class Looks(dc.session().__class__):
    """A session that writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def call(self, record: Any, fn: Any, args: Any, kwargs: Any, options: Any) -> Any:
        self.seen.append(f"call {options.name}")
        return fn(*args, **kwargs) if options.name == "plain" else record(fn, args, kwargs, options)

    def replayed(self, region: Any) -> None:
        assert all(slot.value is not None for slot in region.living())
        self.seen.append(f"replayed {region.options.name}")

    def asked(self, slot: Any) -> None:
        assert slot.value is not None
        self.seen.append("asked")


def test_a_session_sees_calls_replays_and_values_that_are_asked_for() -> None:
    x = leaf(3)
    with Looks() as s:
        kept = dc.checkpoint(torch.sin, x, name="plain")
        out = dc.checkpoint(lambda x: x.sin().sin(), kept, name="region")
    assert s.seen == ["call plain", "call region"]
    out.sum().backward()
    assert s.seen[2:] == ["replayed region", "asked", "asked"]


def test_a_call_that_a_session_keeps_is_never_replayed() -> None:
    x, w = setup()

    def both() -> Any:
        with Looks():
            out = dc.checkpoint(work, x, w, name="plain")
        return torch.autograd.grad(out.sum(), (x, w))

    grads, counts = counted(both)
    assert (counts.regions, counts.replays) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads(), strict=True))


def test_in_a_whole_backward_a_value_in_a_session_dies_with_its_node() -> None:
    x = leaf(4)
    alive: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    class Noise(torch.autograd.Function):
        """Saves a value that needs no gradient, as dropout does."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            noise = torch.full_like(x, 2.0)
            if dc.is_recomputing():
                alive.append(weakref.ref(noise))
            ctx.save_for_backward(noise)
            return x * noise

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            left.append(sum(ref() is not None for ref in alive))
            return grads[0] * ctx.saved_tensors[0]

    with dc.session():
        out = dc.checkpoint(lambda x: Noise.apply(Noise.apply(Noise.apply(x).sin()).sin()).sin(), x)
    gc.disable()
    try:
        out.sum().backward()
    finally:
        gc.enable()
    assert left == [3, 2, 1]


def test_fill_replays_only_what_is_empty() -> None:
    x = leaf(3)
    with dc.session() as s:
        out = dc.checkpoint(torch.sin, x)
    region = s._regions[0]()
    assert region is not None
    assert (fill(region), fill(region)) == (True, False)
    out.sum().backward()
    assert fill(region) is False
