"""Devices: which generators a region stashes, and draws that it could not replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.errors import BadOption, LateDevice
from tests.fakes.module import FakeModule
from tests.fakes.pair import run_pair_file

from .exact import Region, exact
from .test_inputs import PLACES

anywhere = pytest.mark.parametrize("place", PLACES)


def on(device: str, lazy: FakeModule) -> torch.Tensor:
    for generator in lazy.default_generators:
        generator.manual_seed(7)
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    return values.to(device).requires_grad_()


@anywhere
def test_dropout_on_a_device_met_anywhere_in_the_call_is_exact(place: str, lazy: FakeModule) -> None:
    def program(region: Region) -> Any:
        x = on("lazy:1", lazy)
        fn, args, kwargs = PLACES[place](x * 1.0)
        out = region(lambda: F.dropout(fn(*args, **kwargs), 0.5) * x)
        torch.rand(3, device="lazy:1")
        out.sum().backward()
        return out, x.grad, torch.rand(2, device="lazy:1")

    exact(program)


def test_dropout_on_several_devices_of_one_type_is_exact_on_each(lazy: FakeModule) -> None:
    """Also on a device that no input is on."""

    def program(region: Region) -> Any:
        x = on("lazy:1", lazy)

        def fn(t: torch.Tensor) -> torch.Tensor:
            there = F.dropout(t, 0.5).to("lazy:0")
            return F.dropout(there.sin(), 0.5) * there

        out = region(fn, x)
        torch.rand(3, device="lazy:0")
        out.sum().backward()
        return out, x.grad, torch.rand(2, device="lazy:0"), torch.rand(2, device="lazy:1")

    exact(program)


def test_a_draw_on_a_device_known_only_to_a_closure_is_exact(lazy: FakeModule) -> None:
    def program(region: Region) -> Any:
        x = on("lazy:1", lazy)
        out = region(lambda: F.dropout(x.sin(), 0.5) * x)
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_cpu_inputs_with_a_draw_on_the_one_live_device_type_are_exact(lazy: FakeModule) -> None:
    def program(region: Region) -> Any:
        on("lazy:0", lazy)
        x = torch.linspace(0, 1, 64).requires_grad_()
        out = region(lambda t: F.dropout(t.to("lazy:0").sin(), 0.5) * 2, F.dropout(x, 0.5))
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_a_device_region_that_draws_nothing_writes_no_generator(lazy: FakeModule) -> None:
    x = on("lazy:1", lazy)
    out = dc.checkpoint(lambda t: t.sin().exp(), x)
    sets = [g.sets for g in lazy.default_generators]
    out.sum().backward()
    assert [g.sets for g in lazy.default_generators] == sets


def test_a_device_state_is_read_once_however_many_inputs_are_on_it(lazy: FakeModule) -> None:
    x = on("lazy:1", lazy)
    generator = lazy.default_generators[1]

    def reads(*args: torch.Tensor) -> int:
        before = generator.gets
        dc.checkpoint(lambda *ts: sum(t.sin() for t in ts), *args)
        return generator.gets - before

    assert reads(x) == reads(x, x * 1, x * 2, x * 3)


def test_a_device_type_first_initialised_inside_a_region_is_refused(lazy: FakeModule) -> None:
    lazy._initialized = False

    def fn(t: torch.Tensor) -> torch.Tensor:
        lazy._initialized = True
        return F.dropout(t.to("lazy:0"), 0.5).cpu()

    with pytest.raises(LateDevice) as caught:
        dc.checkpoint(fn, torch.ones(4, requires_grad=True))
    assert caught.value.code == "DC106"
    assert "before the region" in str(caught.value)


def test_a_device_that_comes_up_in_a_region_without_stash_is_left_alone(lazy: FakeModule) -> None:
    lazy._initialized = False

    def fn(t: torch.Tensor) -> torch.Tensor:
        lazy._initialized = True
        return t.sin()

    x = torch.ones(4, requires_grad=True)
    dc.checkpoint(fn, x, preserve_rng_state=False).sum().backward()
    assert x.grad is not None


def test_an_unknown_rule_is_refused_and_the_rule_in_force_stays() -> None:
    with pytest.raises(BadOption) as caught:
        dc.devices.rule("sometimes")
    assert "error, warn, all" in str(caught.value)


def test_a_rule_is_undone_when_its_block_ends() -> None:
    from distckpt.engine.rng import current_rule

    assert current_rule("error") == "error"
    with dc.devices.rule("all"):
        assert current_rule("error") == "all"
        with dc.devices.rule("warn"):
            assert current_rule("error") == "warn"
        assert current_rule("error") == "all"
    assert current_rule("error") == "error"


def test_meta_inputs_need_no_device_and_no_state() -> None:
    x = torch.ones(4, 4, device="meta", requires_grad=True)
    out = dc.checkpoint(lambda t: F.dropout(t.sin(), 0.5) @ t, x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (4, 4)


def test_the_rules_for_two_accelerator_types_in_one_call() -> None:
    run_pair_file(Path(__file__).with_name("pair_rules.py"))


def test_a_device_generator_that_a_region_puts_back_is_where_plain_autograd_leaves_it(
    lazy: FakeModule,
) -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        lazy.default_generators[0].manual_seed(5)
        return (t * torch.rand(64, device="lazy:0")).sin() + torch.rand(64, device="lazy:0")

    def program(region: Region) -> Any:
        x = on("lazy:0", lazy)
        outs = [region(fn, x) for _ in range(2)]
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in reversed(outs)]
        return [*outs, *grads, torch.rand(3, device="lazy:0")]

    exact(program)
