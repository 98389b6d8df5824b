"""The self-test finds what it is for, on every device, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.cli import selftest
from distckpt.cli.selftest import AUTOCAST, CASES
from tests.fakes.fixtures import lazy  # noqa: F401
from tests.fakes.module import FakeModule

CPU = torch.device("cpu")


def test_every_case_is_equal_on_the_cpu_in_both_ways() -> None:
    results = selftest.run_selftests([CPU])
    assert {r.status for r in results} == {"equal"}
    assert [(r.case, r.way) for r in results] == [
        (case, way) for case in CASES for way in ("dc.checkpoint", "torch's names")
    ]


def test_it_leaves_random_state_and_grad_mode_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        selftest.run_selftests([CPU])
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_every_device_of_a_type_is_tested(lazy: FakeModule) -> None:  # noqa: F811
    torch.randn(1, device="lazy:1")
    before = lazy.default_generators[1].get_state()
    results = selftest.run_selftests([torch.device("lazy", 0), torch.device("lazy", 1)])
    assert {(r.device, r.status) for r in results if r.case != AUTOCAST} == {
        ("lazy:0", "equal"),
        ("lazy:1", "equal"),
    }
    assert [r.status for r in results if r.case == AUTOCAST] == ["unsure", "unsure"]
    assert torch.equal(before, lazy.default_generators[1].get_state())


def _only(monkeypatch: pytest.MonkeyPatch, case: Any) -> list[selftest.Result]:
    monkeypatch.setattr(selftest, "CASES", {"mine": case})
    return selftest.run_selftests([CPU])


def test_a_replay_that_draws_other_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(device: torch.device, region: Any) -> Any:
        x = torch.ones(64, requires_grad=True)

        def fn(a: torch.Tensor) -> torch.Tensor:
            if dc.is_recomputing():
                torch.rand(1)  # what a region without a stash comes to
            return F.dropout(a, 0.5) * a

        return region(fn, x).sum(), [x]

    ours, torchs = _only(monkeypatch, case)
    assert (ours.status, torchs.status) == ("differs", "differs")
    assert "[DC104]" in ours.detail
    assert "gradient 0" in torchs.detail
    assert "off by up to" in torchs.detail


def test_state_that_changes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(device: torch.device, region: Any) -> Any:
        x, counts = torch.ones(4, requires_grad=True), {"runs": torch.zeros(1)}

        def fn(a: torch.Tensor) -> torch.Tensor:
            counts["runs"].add_(1)
            return torch.sin(a)

        return region(fn, x).sum(), [x, counts["runs"]]

    ours, torchs = _only(monkeypatch, case)
    assert (ours.status, ours.detail) == ("differs", "state 1: off by up to 1.00e+00")
    assert torchs.status == "equal"  # torch's own names never promised that


def test_a_device_that_is_not_deterministic_itself_is_not_blamed_on_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = iter(range(9))

    def case(device: torch.device, region: Any) -> Any:
        x = torch.ones(4, requires_grad=True)
        return (x * next(runs)).sum(), [x]

    (only,) = _only(monkeypatch, case)
    assert (only.status, only.detail) == ("unsure", "two runs without regions differ already")


def test_a_device_that_does_not_start_is_a_failure() -> None:
    (only,) = selftest.run_selftests([torch.device("xpu", 0)])
    assert (only.device, only.case, only.status) == ("xpu:0", "start the device", "differs")
    assert only.detail
