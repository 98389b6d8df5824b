"""Recomputation survives the compiler: read from the program that XLA makes of a training step (see probe.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xla.probe import Compiled, probe_once, shared_folder

SCRIPT = Path(__file__).with_name("step.py")

Step = Callable[..., Compiled]

LAYERS, PRODUCTS = 8, 48  # two matrix products per block forward, four backward


@pytest.fixture
def step(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Step:
    """The compiled step of a variant; each is compiled once per run, whatever number of workers there is."""
    folder = shared_folder(tmp_path_factory, request.config)
    return lambda variant, *options: probe_once(folder, SCRIPT, [variant, *options])


@pytest.mark.parametrize("form", ["nonreentrant", "reentrant"])
def test_each_block_recomputes_one_product_behind_one_barrier(step: Step, form: str) -> None:
    plain, saved = step("none"), step(form)
    assert plain.ops["dot"] == PRODUCTS
    assert plain.ops["opt-barrier"] == 0
    # the first product feeds the GELU and is needed again; the second is only added, and nobody saved its result
    assert saved.ops["dot"] == PRODUCTS + LAYERS
    assert saved.ops["erf"] == 2 * plain.ops["erf"] == 2 * LAYERS
    assert saved.ops["opt-barrier"] == LAYERS


@pytest.mark.parametrize("form", ["nonreentrant", "reentrant"])
def test_temporaries_shrink_at_least_fourfold(step: Step, form: str) -> None:
    assert step("none").temp_bytes >= 4 * step(form).temp_bytes


def test_temporaries_are_no_more_than_with_torch_xla_own_checkpoint(step: Step) -> None:
    assert step("nonreentrant").temp_bytes <= step("torch_xla").temp_bytes


@pytest.mark.parametrize("form", ["nonreentrant", "reentrant"])
@pytest.mark.parametrize("options", [(), ("dropout",)], ids=["plain", "dropout"])
def test_loss_and_gradients_equal_the_step_without_regions(
    step: Step, form: str, options: tuple[str, ...]
) -> None:
    assert step(form, *options).result == step("none", *options).result


def test_temporaries_shrink_with_dropout_too(step: Step) -> None:
    # masks depend on the seed only, so the CPU scheduler may make them early: less than fourfold here
    assert step("none", "dropout").temp_bytes >= 2 * step("nonreentrant", "dropout").temp_bytes
