"""Run by test_regions.py: regions between device types `lazy` and `fake`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.errors import MixedDeviceTypes, UnstashedDraw
from tests.fakes.module import FakeModule


@pytest.fixture
def pair(lazy: FakeModule, fake: FakeModule) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(4, 4, device="fake:0", requires_grad=True)
    b = torch.randn(4, 4, device="lazy:0", requires_grad=True)
    lazy.manual_seed_all(1)
    fake.manual_seed_all(1)
    return a, b


def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.dropout(a * a, 0.5).to(b.device) + F.dropout(b, 0.5)


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [g.cpu() for g in torch.autograd.grad(out.sum(), inputs)]


def test_two_types_among_the_inputs_are_refused(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(MixedDeviceTypes, match=r"(?s)fake.*lazy"):
        dc.checkpoint(both, *pair)


def test_the_rule_all_stashes_both_types_exactly(
    pair: tuple[torch.Tensor, torch.Tensor], lazy: FakeModule, fake: FakeModule
) -> None:
    plain = gradients(both(*pair), *pair)
    lazy.manual_seed_all(1)
    fake.manual_seed_all(1)
    with dc.devices.rule("all"):
        out = dc.checkpoint(both, *pair)
        found = gradients(out, *pair)
    assert all(torch.equal(x, y) for x, y in zip(plain, found, strict=True))


def test_compat_warns_as_torch_does(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dc.compat.checkpoint(lambda a, b: a.to(b.device) + b, *pair, use_reentrant=False)
    assert any("at least two types of devices" in str(w.message) for w in seen)


def test_a_draw_on_a_type_that_no_input_has_is_refused(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = pair
    with pytest.raises(UnstashedDraw, match="fake:0"):
        dc.checkpoint(lambda y: y * F.dropout(a.detach(), 0.5).to(y.device), b)


def test_a_type_that_draws_nothing_may_be_reached(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = pair
    out = dc.checkpoint(lambda y: F.dropout(y, 0.5) * a.detach().to(y.device), b)
    gradients(out, b)
