"""Dispatch modes that are on in only one of record and replay."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distckpt as dc

from .exact import Region, counted, exact, leaf, same_bits


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def summed(x: torch.Tensor) -> torch.Tensor:
    """A gradient that autograd adds up from four parts: in place, unless a dispatch mode is on."""
    (g,) = torch.autograd.grad((x + (x + x) + x + x.sin()).sum(), x)
    return g * x.cos() * g


def rrelu_of_summed(x: torch.Tensor) -> torch.Tensor:
    return F.rrelu(summed(x) - 4.0, 0.1, 0.4, training=True)


MODES = {"off": contextlib.nullcontext, "on": Idle}


@pytest.mark.parametrize("fn", [summed, rrelu_of_summed])
@pytest.mark.parametrize("record", MODES)
@pytest.mark.parametrize("replay", MODES)
def test_a_gradient_taken_inside_is_exact_whichever_of_record_and_replay_a_mode_was_on_in(
    fn: Any, record: str, replay: str
) -> None:
    def program(region: Region) -> Any:
        x = leaf(6)
        with MODES[record]():
            out = region(fn, x * 2.0).sum()
        with MODES[replay]():
            return [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2)]

    counts = exact(program)
    if fn is summed:
        assert counts.replays == (3 if record == replay else 5)  # one of them for the gradient in the record


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_gradient_taken_inside_a_region_of_a_selective_one_is_exact(early_stop: bool) -> None:
    nothing = functools.partial(dc.create_selective_checkpoint_contexts, [])

    def program(region: Region) -> Any:
        x = leaf(6)
        out = region(lambda t: dc.checkpoint(summed, t), x * 2.0)
        return torch.autograd.grad(out.sum(), x)

    exact(program, context_fn=nothing, early_stop=early_stop)


def test_a_captured_tensor_that_was_changed_is_refused_under_a_mode_too() -> None:
    mask, x = torch.ones(4), leaf(4)
    with Idle():
        out = dc.checkpoint(lambda t: (t * mask).sin(), x)
    mask.mul_(2.0)
    with pytest.raises(dc.CheckpointError, match="changed in place"):
        out.sum().backward()


def test_settling_a_nested_region_takes_the_outer_one_no_further_than_another_replay() -> None:
    calls: list[bool] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        calls.append(dc.is_recomputing())
        return torch.autograd.grad(F.rrelu(x, 0.1, 0.4, training=True).sum(), x)[0]

    _, counts = counted(lambda: dc.checkpoint(lambda x: dc.checkpoint(inner, x), leaf(6).sin()))
    assert calls == [
        False,
        True,
        True,
    ]  # the record, the replay for the gradient, and once more for the noise
    assert counts.replays == 4  # and each time the outer one, for the input


@pytest.mark.parametrize("whole", [True, False])
def test_a_flop_counter_around_a_backward_counts_the_replay_as_well(whole: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(region: Any) -> tuple[int, Any]:
        x, w = leaf(4, 6), leaf(6, 6, seed=7)
        out = region(lambda t: (t @ w).sin() @ w, x)
        with FlopCounterMode(display=False) as count:
            if whole:
                out.sum().backward()
                grads = x.grad, w.grad
            else:
                grads = torch.autograd.grad(out.sum(), [x, w])
        return count.get_total_flops(), grads

    one = 2 * 4 * 6 * 6  # a matrix product
    (want, a), (found, b) = flops(lambda fn, *args: fn(*args)), flops(dc.checkpoint)
    assert all(map(same_bits, a, b))
    assert (want, found) == (4 * one, 5 * one)  # the replay stops before its second product
