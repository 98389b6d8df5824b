"""SPMD: FSDPv2 units and hand-made shardings on a mesh of four CPU devices, with regions inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.xla.blocks import BATCH, LAYERS, WIDTH
from tests.xla.probe import Compiled, probe_once, shared_folder

HERE = Path(__file__).parent
DEVICES = 4

Step = Callable[..., Compiled]


@pytest.fixture
def step(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Step:
    """The compiled FSDPv2 step of a variant (spmd_step.py)."""
    folder = shared_folder(tmp_path_factory, request.config)
    return lambda *argv: probe_once(folder, HERE / "spmd_step.py", argv, devices=DEVICES)


@pytest.fixture
def rules(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """The report of spmd_rules.py."""
    folder = shared_folder(tmp_path_factory, request.config)
    return probe_once(folder, HERE / "spmd_rules.py", [], devices=DEVICES).result


@pytest.mark.parametrize("options", [(), ("dropout",)], ids=["plain", "dropout"])
def test_loss_and_gradients_of_fsdpv2_units_are_equal_to_the_bit(
    step: Step, options: tuple[str, ...]
) -> None:
    assert step("regions", *options).result == step("none", *options).result


@pytest.mark.parametrize("options", [(), ("dropout",)], ids=["plain", "dropout"])
def test_each_unit_recomputes_one_product_behind_one_barrier(step: Step, options: tuple[str, ...]) -> None:
    plain, regions = step("none", *options), step("regions", *options)
    assert plain.ops["dot"] == 6 * LAYERS  # two matrix products per block forward, four backward
    assert regions.ops["dot"] == 7 * LAYERS
    assert regions.ops["erf"] == 2 * plain.ops["erf"] == 2 * LAYERS
    assert regions.ops["opt-barrier"] == plain.ops["opt-barrier"] + LAYERS


def test_inputs_stay_sharded_through_the_barrier(step: Step) -> None:
    shard = f"f32[{BATCH // DEVICES},{WIDTH}]"
    ties = [b for b in step("regions").barriers if b == f"{shard} {shard}"]
    assert len(ties) == LAYERS  # a region's input and its gradient


def test_a_replay_gathers_the_weight_and_bias_of_its_product_again(step: Step) -> None:
    plain, regions = step("none"), step("regions")
    assert regions.ops["all-gather"] == plain.ops["all-gather"] + 2 * LAYERS
    assert regions.ops["all-reduce"] == plain.ops["all-reduce"]


def test_temporaries_of_one_device_shrink_fourfold(step: Step) -> None:
    assert step("none").temp_bytes >= 4 * step("regions").temp_bytes


def test_temporaries_shrink_with_dropout_too(step: Step) -> None:
    # masks depend on the seed only, so the CPU scheduler may make them early
    assert step("none", "dropout").temp_bytes >= 1.5 * step("regions", "dropout").temp_bytes


@pytest.mark.parametrize(
    "rule",
    [
        "annotations inside, dc.checkpoint",
        "annotations inside, dc.apply",
        "regions inside FSDPv2 units",
        "regions around FSDPv2 units",
        "regions inside, after wrapping FSDPv2 units",
    ],
)
def test_gradients_their_sharding_and_the_random_state_are_equal_to_the_bit(rules: Any, rule: str) -> None:
    assert rules[rule] is True


def test_five_steps_of_sgd_with_momentum_end_at_the_same_weights(rules: Any) -> None:
    assert rules["five steps of SGD"] is True


def test_restored_random_states_compile_no_new_programs(rules: Any) -> None:
    assert rules["programs compiled after the third step"] == 0


def test_a_flush_before_backward_leaves_rounding_only(rules: Any) -> None:
    # the forward is in another program then, and XLA fuses what it recomputes in its own way
    assert rules["a flush before backward, difference"] <= 1e-6
