"""Mismatch errors name the first operator that differs, its source line and its module."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc
from distckpt.engine import determinism
from distckpt.engine.stats import counters

from .exact import leaf


def moody(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y = y[:2] if dc.is_recomputing() else y[:3]  # the first difference
    return y.exp().cos()


def line_of(fn: Any, text: str) -> int:
    import inspect

    lines, first = inspect.getsourcelines(fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


def failure(fn: Any, *args: Any, **options: Any) -> dc.CheckpointError:
    out = dc.checkpoint(fn, *args, **options)
    with pytest.raises(dc.CheckpointError) as caught:
        out.sum().backward()
    return caught.value


@pytest.mark.parametrize("debug", [False, True])
def test_the_first_operator_that_differs_is_named_with_its_source_line(debug: bool) -> None:
    text = str(failure(moody, leaf(8), debug=debug))
    assert re.search(r"forward: .*aten\.slice.*\n.*replay:|aten\.slice", text)
    assert f"test_diagnose.py:{line_of(moody, 'the first difference')}" in text
    assert "why:" in text
    assert "fix:" in text


def test_the_module_path_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(8, 8)
            self.act = Act()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.mlp(x))

    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return moody(x)

    text = str(failure(Block(), leaf(8)))
    assert "act" in text
    assert "moody" in text


def test_an_operator_that_only_one_run_has_is_named() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y if dc.is_recomputing() else y.exp()

    text = str(failure(fn, leaf(8)))
    assert "Only the forward ran" in text
    assert "aten.exp" in text


def test_state_that_changed_since_the_forward_is_reported_at_the_operator_that_shows_it() -> None:
    state = {"width": 4}

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x[: state["width"]].sin().exp()

    out = dc.checkpoint(fn, leaf(8))
    state["width"] = 3
    with pytest.raises(dc.CheckpointError) as caught:
        out.sum().backward()
    assert "belongs to this operator" in str(caught.value)
    assert "test_diagnose.py" in str(caught.value)


def test_the_name_of_a_region_is_in_its_errors() -> None:
    other = torch.ones(8)
    out = dc.checkpoint(lambda x, y: (x * y).sin(), leaf(8), other, name="block 7")
    other.add_(1)
    with pytest.raises(dc.CheckpointError):
        out.sum().backward()

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() if dc.is_recomputing() else x.sin().exp()) + 1

    assert "block 7" in str(failure(fn, leaf(8), name="block 7"))


def test_nothing_is_logged_or_run_again_before_a_replay_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = determinism.diagnose
    monkeypatch.setattr(determinism, "diagnose", lambda m, replay: ran.append("diagnosed") or real(m, replay))
    dc.checkpoint(lambda t: t.sin().exp(), leaf(8)).sum().backward()
    assert ran == []
    before = counters.replays
    failure(moody, leaf(8))
    assert ran == ["diagnosed"]
    assert counters.replays - before <= 3  # the one that failed, and only this region twice more


def test_the_diagnosis_leaves_generators_and_buffers_alone() -> None:
    norm = nn.BatchNorm1d(4)

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(norm(x), 0.5)
        return moody(y)

    out = dc.checkpoint(fn, leaf(8, 4))
    state, stats = torch.get_rng_state(), [b.clone() for b in norm.buffers()]
    with pytest.raises(dc.CheckpointError):
        out.sum().backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(stats, norm.buffers(), strict=True))


def test_a_diagnosis_that_fails_itself_still_gives_the_error() -> None:
    runs = 0

    def fn(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs > 2:
            raise KeyError("no third run")
        return x.sin()[:runs].exp()

    text = str(failure(fn, leaf(8)))
    assert "DC102" in text
    assert "no third run" in text


def test_debug_and_context_fn_may_be_combined() -> None:
    import functools

    make = functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    x = leaf(8)
    dc.checkpoint(lambda t: t.sin().exp(), x, debug=True, context_fn=make).sum().backward()
    assert x.grad is not None
    text = str(failure(moody, leaf(8), debug=True, context_fn=make))
    assert "aten.slice" in text


def test_the_debug_switch_decides_for_every_region_in_its_context() -> None:
    from distckpt.engine.api import make_options
    from distckpt.engine.record import close_region, open_region

    def logged(**given: Any) -> bool:
        options, _ = make_options(given)
        region = open_region(torch.sin, (leaf(2),), {}, options)
        close_region(region, None)
        return region.log is not None

    with dc.set_checkpoint_debug_enabled(True):
        assert logged()
        with dc.set_checkpoint_debug_enabled(False):
            assert not logged(debug=True)
        with dc.set_checkpoint_debug_enabled(None):
            assert not logged()
            assert logged(debug=True)
    assert not logged()


def test_debug_does_not_get_slower_with_every_step() -> None:
    """Torch's log mode leaves something behind in each call (pytorch#163923)."""
    from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

    before = len(_global_forward_hooks) + len(_global_forward_pre_hooks)
    for _ in range(5):
        dc.checkpoint(lambda t: t.sin().exp(), leaf(8), debug=True).sum().backward()
    assert len(_global_forward_hooks) + len(_global_forward_pre_hooks) == before


def test_mismatch_errors_survive_pickling() -> None:
    error = failure(moody, leaf(8))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.code, again.what, again.fix) == (error.code, error.what, error.fix)
