"""Replay: the second run is the first one, as far as it is needed, and nothing swallows or leaks its end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import distckpt as dc
from distckpt.engine.stats import counters

from .exact import Region, counted, exact, leaf


def work(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).exp().sin()


class SquareReadTwice(torch.autograd.Function):
    """Asks for its saved tensors twice in one backward, as several fused kernels do."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a * b
        ctx.save_for_backward(a, b, out)
        return out * 1.0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, _, _ = ctx.saved_tensors
        _, b, out = ctx.saved_tensors
        return grad * b * (out / out), grad * a


@pytest.mark.parametrize("early_stop", [True, False])
def test_saved_tensors_may_be_read_twice_in_one_backward(early_stop: bool) -> None:
    def program(region: Region) -> Any:
        x, y = leaf(8), leaf(8, seed=2)
        out = region(lambda a, b: SquareReadTwice.apply(a.exp(), F.dropout(b.exp(), 0.3) + 1).sin(), x, y)
        out.sum().backward()
        return out, x.grad, y.grad

    exact(program, early_stop=early_stop)


def test_a_users_except_exception_does_not_swallow_the_early_stop() -> None:
    def guarded(t: torch.Tensor) -> torch.Tensor:
        try:
            return t.sin().exp()
        except Exception:
            return t * 0

    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(guarded, x)
        out.sum().backward()
        return out, x.grad

    assert exact(program).replays == 1


def test_a_users_bare_except_around_the_last_operators_still_gives_exact_gradients() -> None:
    def guarded(t: torch.Tensor) -> torch.Tensor:
        t = t.sin()
        try:
            t = t.exp()
        except:  # noqa: E722
            t = t * 0
        return t + 1

    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(guarded, x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_a_users_retry_loop_around_an_operator_ends() -> None:
    def retried(t: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            try:
                return t.sin().exp()
            except:  # noqa: E722
                continue
        return t

    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(retried, x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_finally_blocks_and_context_managers_of_a_region_run_in_the_replay_too() -> None:
    ended: list[bool] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        try:
            return t.sin().exp()
        finally:
            ended.append(dc.is_recomputing())

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert ended == [False, True]


def test_early_stop_skips_what_follows_the_last_saved_tensor() -> None:
    ran: list[str] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        t = t.sin().exp()
        ran.append("tail")
        return t + 1

    x = leaf(4)
    dc.checkpoint(fn, x).sum().backward()
    assert ran == ["tail"]
    dc.checkpoint(fn, x, early_stop=False).sum().backward()
    assert ran == ["tail"] * 3
    with dc.set_checkpoint_early_stop(False):
        out = dc.checkpoint(fn, x)
    out.sum().backward()
    assert ran == ["tail"] * 5
    with dc.set_checkpoint_early_stop(True):
        out = dc.checkpoint(fn, x, early_stop=False)
    out.sum().backward()
    assert ran == ["tail"] * 6


def test_is_recomputing_is_true_in_replays_only_also_nested() -> None:
    seen: list[bool] = []

    def inner(t: torch.Tensor) -> torch.Tensor:
        seen.append(dc.is_recomputing())
        return t.sin().exp()

    def outer(t: torch.Tensor) -> torch.Tensor:
        t = dc.checkpoint(inner, t)
        seen.append(dc.is_recomputing())
        return t.cos()

    out = dc.checkpoint(outer, leaf(4)).sum()
    assert seen == [False, False]
    out.backward()
    # the outer replay records the inner region again, and the inner region then replays for itself
    assert seen == [False, False, True, True, True]
    assert not dc.is_recomputing()


def test_is_recomputing_is_false_again_after_a_replay_that_raised() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        if dc.is_recomputing():
            raise KeyError("replay")
        return t.sin().exp()

    out = dc.checkpoint(fn, leaf(4)).sum()
    with pytest.raises(KeyError):
        out.backward()
    assert not dc.is_recomputing()
    dc.checkpoint(work, leaf(4)).sum().backward()


def test_is_recomputing_belongs_to_the_thread_that_replays() -> None:
    elsewhere: list[bool] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        if dc.is_recomputing():
            thread = threading.Thread(target=lambda: elsewhere.append(dc.is_recomputing()))
            thread.start()
            thread.join()
        return t.sin().exp()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert elsewhere == [False]


def test_every_backward_of_a_retained_graph_replays_once_and_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(work, x).sum()
        for _ in range(3):
            out.backward(retain_graph=True)
        return (x.grad,)

    assert exact(program).replays == 3


def test_a_double_backward_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(lambda t: F.dropout(work(t), 0.3) * t, x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        g.pow(2).sum().backward()
        return out, g, x.grad

    exact(program)


def test_gradgradcheck_passes_through_nested_regions() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return dc.checkpoint(lambda t: dc.checkpoint(lambda u: u.sin() * u, t).exp() * t, x)

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fn, x)
    assert torch.autograd.gradgradcheck(fn, x)


def test_partial_backwards_through_one_region_are_exact() -> None:
    def program(region: Region) -> Any:
        x, y = leaf(8), leaf(8, seed=2)

        def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
            return a.sin().exp(), (b.cos() * a).exp()

        u, v = region(fn, x, y)
        one = torch.autograd.grad(u.sum(), x, retain_graph=True)
        two = torch.autograd.grad(v.sum(), y, retain_graph=True)
        three = torch.autograd.grad((u * v).sum(), (x, y))
        return (*one, *two, *three)

    exact(program)


def test_disjoint_partial_backwards_without_retain_graph_are_exact() -> None:
    def program(region: Region) -> Any:
        x, y = leaf(8), leaf(8, seed=2)
        u, v = region(lambda a, b: (work(a), work(b)), x, y)
        u.sum().backward()
        v.sum().backward()
        return x.grad, y.grad

    exact(program)


def test_a_gradient_taken_inside_a_region_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(8)

        def fn(t: torch.Tensor) -> torch.Tensor:
            energy = work(t).sum()
            (force,) = torch.autograd.grad(energy, t, create_graph=True)
            return force.sin() * t

        out = region(lambda t: region(fn, t).exp(), x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_views_and_in_place_operators_in_a_region_are_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(4, 4)

        def fn(t: torch.Tensor) -> torch.Tensor:
            y = t * 2
            y[1:3].mul_(2.0)
            z = y * 3
            z.t_().add_(1.0)
            return z * y.view(16)[:4]

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad

    exact(program)


@pytest.mark.parametrize("check", ["default", "bitwise"])
def test_saved_tensor_hooks_inside_a_region_are_exact(check: str) -> None:
    def program(region: Region) -> Any:
        x = leaf(8)

        def fn(t: torch.Tensor) -> torch.Tensor:
            t = t.sin()
            with torch.autograd.graph.saved_tensors_hooks(lambda s: s.clone(), lambda s: s):
                t = F.dropout(t, 0.4).exp() * t
            return t.sin()

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad

    exact(program, determinism_check=check)


def test_outputs_of_any_shape_come_back_as_they_are() -> None:
    x = leaf(4)
    note = object()
    out = dc.checkpoint(lambda t: {"y": t.sin(), "more": [t.exp(), 3], "note": note, "x": t}, x)
    assert set(out) == {"y", "more", "note", "x"}
    assert out["note"] is note
    assert out["x"] is x
    (out["y"] * out["more"][0]).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad((x.sin() * x.exp()).sum(), x)[0])


def test_saved_values_can_be_looked_at_outside_a_backward() -> None:
    x = leaf(4)
    out = dc.checkpoint(lambda t: t.sin().exp(), x)
    before = counters.replays
    assert torch.equal(out.grad_fn._saved_result, x.sin().exp())
    assert counters.replays == before + 1
    out.sum().backward()


def test_hooks_on_tensors_inside_a_region_run_once_in_the_backward() -> None:
    seen: list[str] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        if not dc.is_recomputing():
            y.register_hook(lambda g: seen.append("hook"))
        return y.exp()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert seen == ["hook"]


def test_an_exception_in_the_forward_passes_through_and_leaves_the_engine_usable() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        raise KeyError("forward")

    with pytest.raises(KeyError, match="forward"):
        dc.checkpoint(lambda t: dc.checkpoint(fn, t.sin()), leaf(4))
    x = leaf(4)
    y = x.exp()  # not saved into a region that has ended
    y.sum().backward()
    _, counts = counted(lambda: dc.checkpoint(work, x).sum().backward())
    assert (counts.regions, counts.replays) == (1, 1)


def test_checkpoint_sequential_is_exact_and_leaves_the_last_part_alone() -> None:
    def program(region: Region) -> Any:
        torch.manual_seed(1)
        layers = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.3)) for _ in range(5))
        )
        x = leaf(3, 6)
        out = layers(x) if region.__name__ == "plain" else dc.checkpoint_sequential(layers, 2, x)
        out.sum().backward()
        return out, x.grad, *(p.grad for p in layers.parameters())

    from .exact import plain, same_bits

    def ours(fn: Any) -> Any:
        return fn

    (expected, _), (found, counts) = counted(lambda: program(plain)), counted(lambda: program(ours))
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    assert (counts.regions, counts.replays) == (1, 1)


def through_vmap(x: torch.Tensor) -> torch.Tensor:
    out = torch.vmap(lambda t: dc.checkpoint(lambda u: u.sin().exp().sin(), t))(x)
    return torch.autograd.grad(out.sum(), x)[0]


def batched_with_dropout(x: torch.Tensor) -> torch.Tensor:
    out = dc.checkpoint(lambda t: torch.nn.functional.dropout(t.sin(), 0.5) * t, x)
    return torch.autograd.grad(out, x, torch.eye(4), is_grads_batched=True)[0]


@pytest.mark.parametrize("gradient", [through_vmap, batched_with_dropout])
def test_a_gradient_that_would_replay_a_region_under_another_vmap_is_refused(gradient: Any) -> None:
    if gradient is through_vmap and torch.__version__.startswith(("2.9", "2.10", "2.11")):
        assert torch.equal(through_vmap(x := leaf(4)), torch.autograd.grad(x.sin().exp().sin().sum(), x)[0])
        return
    with pytest.raises(dc.CheckpointError) as caught:
        gradient(leaf(4))
    assert caught.value.code == "DC129"
