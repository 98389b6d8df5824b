"""Memory: what a region keeps, and when it lets go, counted by weak references with the collector off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine import record as record_module

from .exact import leaf


@pytest.fixture(autouse=True)
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watch:
    """Weak references to every tensor that passes through it."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.refs.append(weakref.ref(x))
        return x

    @property
    def alive(self) -> int:
        return sum(r() is not None for r in self.refs)


def chain(watch: Watch, n: int = 5) -> Callable[[torch.Tensor], torch.Tensor]:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(n):
            x = watch(x.sin())
        return x * 1.0

    return fn


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to every region made in the test."""
    found: list[weakref.ref[Any]] = []

    class Seen(record_module.Region):
        def __init__(self) -> None:
            found.append(weakref.ref(self))

    monkeypatch.setattr(record_module, "Region", Seen)
    return found


def test_nothing_inside_a_region_lives_after_its_forward() -> None:
    watch = Watch()
    out = dc.checkpoint(chain(watch), leaf(4))
    assert len(watch.refs) == 5
    assert watch.alive == 0
    del out


def test_recomputed_values_die_at_their_last_use() -> None:
    watch = Watch()
    alive: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = watch(x.sin())
            if not dc.is_recomputing():
                x.register_hook(lambda g: alive.append(watch.alive))
        return x.exp()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert alive == sorted(alive, reverse=True)
    assert alive[0] <= 5
    assert alive[-1] <= 1
    assert watch.alive == 0


def test_a_partial_backward_with_retain_graph_leaves_nothing_behind() -> None:
    watch = Watch()
    x = leaf(4)
    mids: list[torch.Tensor] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        for i in range(6):
            t = watch(t.sin())
            if i == 2 and not dc.is_recomputing():
                mids.append(t)
        return t * 1.0

    out = dc.checkpoint(fn, x).sum()
    mid = mids.pop()
    for _ in range(5):
        torch.autograd.grad(out, mid, retain_graph=True)
        assert watch.alive == 1  # only what this test holds itself
    del mid
    assert watch.alive == 0


def test_a_hundred_backwards_of_one_region_do_not_pile_up() -> None:
    watch = Watch()
    x = leaf(4)
    out = dc.checkpoint(chain(watch), x).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    before = len(gc.get_objects())
    for _ in range(100):
        torch.autograd.grad(out, x, retain_graph=True)
    watch.refs.clear()
    assert len(gc.get_objects()) - before < 50
    assert watch.alive == 0


def test_looking_at_a_saved_value_outside_backward_leaves_nothing_behind() -> None:
    watch = Watch()
    out = dc.checkpoint(lambda t: watch(t.sin()).exp(), leaf(4))
    for _ in range(3):
        assert out.grad_fn._saved_result is not None
    assert watch.alive == 0


def cases() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    bn = torch.nn.BatchNorm1d(4)
    return {
        "chain": chain(Watch()),
        "dropout": lambda x: torch.nn.functional.dropout(x, 0.5).sin(),
        "nested": lambda x: dc.checkpoint(lambda t: dc.checkpoint(torch.sin, t).exp(), x).cos(),
        "pin": lambda x: x * dc.pin(x.detach().sin()),
        "buffers": lambda x: bn(x.view(1, 4).expand(3, 4)).sin(),
        "gradient inside": lambda x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0].exp(),
        "container": lambda x: dc.checkpoint(lambda d: d["x"].sin(), {"x": x}).exp(),
    }


@pytest.mark.parametrize("check", ["default", "fingerprint", "bitwise"])
@pytest.mark.parametrize("name", cases())
def test_a_region_is_freed_by_reference_count_after_its_backward(
    name: str, check: str, regions: list[weakref.ref[Any]]
) -> None:
    x = leaf(4)
    out = dc.checkpoint(cases()[name], x, determinism_check=check).sum()
    out.backward()
    del out
    assert regions
    assert all(ref() is None for ref in regions)


@pytest.mark.parametrize("name", cases())
def test_a_region_is_freed_by_reference_count_when_its_graph_is_dropped(
    name: str, regions: list[weakref.ref[Any]]
) -> None:
    out = dc.checkpoint(cases()[name], leaf(4)).sum()
    assert any(ref() is not None for ref in regions)
    del out
    assert all(ref() is None for ref in regions)


def test_a_region_is_freed_after_retained_backwards_when_its_graph_is_dropped(
    regions: list[weakref.ref[Any]],
) -> None:
    x = leaf(4)
    out = dc.checkpoint(chain(Watch()), x).sum()
    for _ in range(2):
        torch.autograd.grad(out, x, retain_graph=True)
    del out
    assert all(ref() is None for ref in regions)


def test_a_region_is_freed_after_a_failed_replay(regions: list[weakref.ref[Any]]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin()[: 2 if dc.is_recomputing() else 3].exp()

    out = dc.checkpoint(fn, leaf(4)).sum()
    try:
        out.backward()
    except dc.CheckpointError:
        pass
    del out
    gc.collect()  # the traceback held frames, and those held the region
    assert all(ref() is None for ref in regions)


@pytest.mark.parametrize("options", [{"debug": True}, {"name": "block"}, {"early_stop": False}], ids=str)
def test_a_region_with_options_is_freed_by_reference_count(
    options: dict[str, Any], regions: list[weakref.ref[Any]]
) -> None:
    out = dc.checkpoint(chain(Watch()), leaf(4), **options).sum()
    out.backward()
    del out
    assert all(ref() is None for ref in regions)


def test_a_region_whose_output_needs_no_gradient_keeps_nothing(regions: list[weakref.ref[Any]]) -> None:
    x = torch.ones(4)
    ref = weakref.ref(x)
    out = dc.checkpoint(lambda t: t.sin().exp(), x)
    del x
    assert ref() is None
    assert all(r() is None for r in regions)
    del out


def test_an_input_is_not_kept_by_a_region_whose_graph_saved_nothing() -> None:
    y = leaf(4) * 1.0
    ref = weakref.ref(y)
    out = dc.checkpoint(lambda t: t + 1, y)
    del y
    assert ref() is None
    out.sum().backward()


def test_training_steps_reach_a_steady_number_of_objects() -> None:
    layers = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1)) for _ in range(3)
    )

    def step() -> None:
        x = torch.ones(2, 4)
        for layer in layers:
            x = dc.checkpoint(layer, x).sin()
        x.sum().backward()

    for _ in range(3):
        step()
    before = len(gc.get_objects())
    for _ in range(20):
        step()
    assert len(gc.get_objects()) - before < 20
