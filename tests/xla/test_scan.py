"""torch_xla's scan: regions inside the layers it runs, and around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.xla.probe import Compiled, probe_once, shared_folder

HERE = Path(__file__).parent

Step = Callable[..., Compiled]


@pytest.fixture
def step(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Step:
    """The compiled step of a variant, dropout on (scan_step.py)."""
    folder = shared_folder(tmp_path_factory, request.config)
    return lambda variant: probe_once(folder, HERE / "scan_step.py", [variant])


@pytest.fixture
def rules(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """The report of scan_rules.py."""
    folder = shared_folder(tmp_path_factory, request.config)
    return probe_once(folder, HERE / "scan_rules.py", []).result


def test_the_backward_loop_recomputes_one_product_of_each_layer(step: Step) -> None:
    plain, regions = step("none"), step("regions")
    assert plain.ops["while"] == regions.ops["while"] == 2
    assert plain.ops["dot"] == 6  # of the two loops together: they hold each layer's code once
    assert regions.ops["dot"] == 7


def test_temporaries_are_halved(step: Step) -> None:
    assert step("none").temp_bytes >= 2 * step("regions").temp_bytes


def test_the_loss_with_dropout_is_equal_to_the_bit(step: Step) -> None:
    assert step("regions").result["loss"] == step("none").result["loss"]


@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float32", 1e-6), ("torch.float64", 1e-14)])
def test_gradients_with_dropout_differ_by_rounding_only(rules: Any, dtype: str, rounding: float) -> None:
    # the compiler fuses and lays out what it recomputes in its own way; twice the digits, half the difference
    assert rules["rounding"][f"{dtype}: loss"] is True
    assert rules["rounding"][f"{dtype}: difference"] <= rounding


def test_nested_regions_in_a_layer_are_right_too(rules: Any) -> None:
    assert rules["forms"]["nested regions in a layer, difference"] <= 1e-6


@pytest.mark.parametrize("draw", ["bernoulli", "rand_like"])
def test_backward_uses_the_mask_of_the_forward(rules: Any, draw: str) -> None:
    assert rules["masks"][draw] is True


def test_torch_xla_own_way_to_recompute_draws_another_mask(rules: Any) -> None:
    # why regions keep what was drawn: with a zero memory budget the partitioner draws again
    assert rules["masks"]["torch_xla's own way"] is False


@pytest.mark.parametrize("form", ["a region around a scan", "a reentrant region around a scan"])
def test_a_region_around_a_scan_that_draws_nothing_is_equal_to_the_bit(rules: Any, form: str) -> None:
    assert rules["around"][form] is True


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("reentrant", "DC470"),
        ("context_fn", "DC470"),
        ("debug", "DC470"),
        ("bitwise", "DC470"),
        ("pin", "DC470"),
        ("fused dropout", "DC471"),
        ("drawing scan in a region", "DC473"),
        ("drawing scan in a reentrant region", "DC473"),
        ("drawing scan without gradients in a region", "DC473"),
        ("cached drawing scan in a region", "DC473"),
    ],
)
def test_what_cannot_be_exact_is_refused(rules: Any, what: str, code: str) -> None:
    assert rules["refusals"][what] == code


def test_a_refusal_leaves_nothing_behind(rules: Any) -> None:
    assert rules["refusals"]["and after all these a plain region"] == "none"
