"""Region plans: what is seen of a model, and that equal plans are equal text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

import distckpt as dc
from distckpt.compat.wrapper import checkpoint_wrapper, composable_checkpoint
from distckpt.errors import BadPlan
from distckpt.ranks import RegionPlan
from distckpt.ranks.plan import comparable, describe_region, differing_regions, regions_of


def model(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(layers)])


def test_regions_of_dc_apply_are_seen_with_their_options() -> None:
    made = model()
    dc.apply(made, ["0", "2"], determinism_check="bitwise")
    found = regions_of(made)
    assert list(found) == ["0", "2"]
    assert found["0"]["options"]["determinism_check"] == "bitwise"
    assert describe_region(found["0"]) == "a region by distckpt with determinism_check=bitwise"


def test_a_region_taken_off_is_not_seen() -> None:
    made = model()
    dc.apply(made, "*").remove()
    assert regions_of(made) == {}


def test_composable_and_wrapper_forms_are_seen_and_wrappers_do_not_change_names() -> None:
    made = model()
    composable_checkpoint(made[0])
    made[1] = checkpoint_wrapper(made[1])
    made[2] = torchs.checkpoint_wrapper(made[2], preserve_rng_state=False)
    dc.apply(made[1], "_checkpoint_wrapped_module.0")
    found = regions_of(made)
    assert {name: entry["by"] for name, entry in found.items()} == {
        "0": "distckpt",
        "1": "checkpoint_wrapper",
        "1.0": "distckpt",
        "2": "checkpoint_wrapper",
    }
    assert "preserve_rng_state" in describe_region(found["2"])
    assert found["1"] != found["2"]


def test_torchs_own_composable_form_is_seen() -> None:
    from torch.distributed._composable import checkpoint

    made = model(1)
    checkpoint(made[0])
    assert regions_of(made) == {"0": {"by": "torch.distributed._composable.checkpoint", "options": {}}}


def test_equal_plans_of_two_models_are_equal_text_and_differ_when_an_option_does() -> None:
    def policy(ctx: object, op: object) -> bool:
        return True

    def plan(**options: object) -> RegionPlan:
        made = model()
        dc.apply(made, "*", **options)  # type: ignore[arg-type]
        return RegionPlan.of(made)

    select = functools.partial(dc.create_selective_checkpoint_contexts, policy)
    ops = functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    assert plan(context_fn=select).to_json() == plan(context_fn=select).to_json()
    hashes = {p.hash for p in (plan(), plan(context_fn=select), plan(context_fn=ops), plan(early_stop=False))}
    assert len(hashes) == 4


def test_a_plan_survives_json_and_a_file(tmp_path: Path) -> None:
    made = model()
    dc.apply(made, "1")
    plan = RegionPlan.of({0: model(), 3: made}, world_size=8)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    for again in (RegionPlan.from_json(plan.to_json()), RegionPlan.from_json(path)):
        assert again.to_json() == plan.to_json()
        assert again.world_size == 8
        assert list(again.stages) == ["0", "3"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "stages": 3, "world_size": null}']
)
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(BadPlan):
        RegionPlan.from_json(text)


def test_a_missing_plan_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="FileNotFound"):
        RegionPlan.from_json(tmp_path / "none.json")


def test_values_are_compared_by_name_and_never_by_address() -> None:
    class Thing:
        pass

    assert comparable(Thing()) == comparable(Thing())
    assert comparable({"b": [torch.ops.aten.mm.default], "a": {3, 1}}) == {
        "b": ["aten.mm.default"],
        "a": ["1", "3"],
    }


def test_differences_name_modules_that_only_one_side_has_or_has_otherwise() -> None:
    one = {"a": {"by": "x"}, "b": {"by": "x"}}
    two = {"a": {"by": "x"}, "b": {"by": "y"}, "c": {"by": "x"}}
    assert differing_regions(one, two) == ["b", "c"]


def test_plans_differ_when_the_settings_of_a_partition_do() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        coord = dc.Coordinator()

        def plan(**settings: Any) -> RegionPlan:
            made = model()
            dc.apply(made, "*", partition=coord.partition(dist.group.WORLD, **settings))
            return RegionPlan.of(made)

        assert plan().hash == plan().hash
        assert plan().hash != plan(min_bytes=16).hash
        assert plan().hash != plan(prefetch=False).hash
    finally:
        dist.destroy_process_group()


def test_generators_and_devices_are_told_by_device_type_which_ranks_share() -> None:
    def draws(generator: torch.Generator, device: torch.device) -> None: ...

    ways = [functools.partial(draws, torch.Generator(), torch.device("cuda", index)) for index in (0, 1)]
    assert comparable(ways[0]) == comparable(ways[1])
    assert comparable(ways[0])["args"] == ["Generator on cpu", "device on cuda"]
