"""Run by test_devices.py in a process of its own: device types `lazy` and `fake` in one region."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.errors import MixedDeviceTypes, UnstashedDraw
from tests.engine.exact import Region, exact
from tests.fakes.module import FakeModule


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(0, 1, 64).to("fake:0").requires_grad_()
    y = torch.linspace(1, 2, 64).to("lazy:1").requires_grad_()
    return x, y


def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.sin(), 0.5).to("lazy:1") * F.dropout(y.exp(), 0.5)


def reseed(*modules: FakeModule) -> None:
    for module in modules:
        module.manual_seed_all(11)


CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "positional": lambda region, x, y: region(both, x, y),
    "keyword": lambda region, x, y: region(both, x, y=y),
    "nested": lambda region, x, y: region(lambda d: both(d["x"], d["y"][0]), {"x": x, "y": [y]}),
    "partial": lambda region, x, y: region(functools.partial(both, x, y=y)),
}


@pytest.mark.parametrize("call", CALLS)
def test_inputs_on_two_types_are_refused_by_default(call: str, lazy: FakeModule, fake: FakeModule) -> None:
    with pytest.raises(MixedDeviceTypes) as caught:
        CALLS[call](dc.checkpoint, *inputs())
    assert caught.value.code == "DC107"
    assert 'rule("all")' in str(caught.value)
    assert "fake" in str(caught.value)
    assert "lazy" in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_rule_all_stashes_every_type_and_is_exact(call: str, lazy: FakeModule, fake: FakeModule) -> None:
    def program(region: Region) -> Any:
        reseed(lazy, fake)
        x, y = inputs()
        out = CALLS[call](region, x, y)
        torch.rand(3, device="fake:0")
        torch.rand(3, device="lazy:1")
        out.sum().backward()
        return out, x.grad, y.grad

    with dc.devices.rule("all"):
        exact(program)


def test_rule_warn_warns_and_stashes_the_first_type(lazy: FakeModule, fake: FakeModule) -> None:
    with dc.devices.rule("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dc.checkpoint(lambda x, y: x.sin().to("lazy:1") * y.exp(), *inputs()).sum().backward()
    assert any("at least two types of devices" in str(w.message) for w in caught)


def test_a_draw_on_an_unstashed_type_is_refused(lazy: FakeModule, fake: FakeModule) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * F.dropout(torch.ones(64, device="lazy:0"), 0.5).to("fake:0")

    with pytest.raises(UnstashedDraw) as caught:
        dc.checkpoint(fn, inputs()[0])
    assert caught.value.code == "DC105"
    assert "lazy:0" in str(caught.value)


def test_a_draw_on_an_unstashed_type_is_a_warning_in_compat(lazy: FakeModule, fake: FakeModule) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * F.dropout(torch.ones(64, device="lazy:0"), 0.5).to("fake:0")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dc.compat.checkpoint(fn, inputs()[0], use_reentrant=False)
    assert any("DC105" in str(w.message) for w in caught)


def test_a_draw_on_every_type_under_rule_all_is_exact_without_inputs_there(
    lazy: FakeModule, fake: FakeModule
) -> None:
    def program(region: Region) -> Any:
        reseed(lazy, fake)
        x, y = inputs()

        def fn(a: torch.Tensor) -> torch.Tensor:
            return a.sin() * F.dropout(y.exp(), 0.5).to("fake:0")

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad, y.grad

    with dc.devices.rule("all"):
        exact(program)


def test_the_replay_runs_the_same_whichever_device_is_current(lazy: FakeModule, fake: FakeModule) -> None:
    def program(region: Region) -> Any:
        reseed(lazy)
        lazy.set_device(0)
        y = inputs()[1]
        out = region(lambda t: F.dropout(t.sin(), 0.5) * t, y)
        lazy.set_device(1)
        out.sum().backward()
        return out, y.grad

    exact(program)


def test_autocast_of_the_device_is_entered_again_for_its_replay(lazy: FakeModule, fake: FakeModule) -> None:
    seen: list[tuple[bool, torch.dtype, bool]] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        kind = "fake"
        seen.append(
            (
                torch.is_autocast_enabled(kind),
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return t.sin().exp()

    x = inputs()[0]
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # torch has none for this type
    library.fallback(torch.library.fallthrough_kernel)
    torch.set_autocast_enabled("fake", True)
    torch.set_autocast_dtype("fake", torch.bfloat16)
    try:
        out = dc.checkpoint(fn, x)
    finally:
        torch.set_autocast_enabled("fake", False)
        torch.set_autocast_dtype("fake", torch.float16)
    out.sum().backward()
    assert seen == [(True, torch.bfloat16, False)] * 2
    assert not torch.is_autocast_enabled("fake")
    assert torch.get_autocast_dtype("fake") == torch.float16
