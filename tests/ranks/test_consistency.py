"""Four real ranks check each other: what they agree on, and what each of them gets when they do not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ranks.spawn import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.ranks.jobs.agree", 4)


AGREED = [
    "equal",
    "nothing",
    "again after an error",
    "stages free",
    "interleaved",
    "mesh with stages",
    "plan met",
    "plan met as JSON",
    "device types, warn",
    "device types, all",
    "equal at the end",
    "frozen everywhere",
    "on meta",
    "on meta on one rank",
    "other widths in other stages",
    "other widths along tp",
    "other widths in other stages of a mesh",
    "uninitialized",
    "fsdp2",
    "hsdp",
    "fsdp1",
    "tensor parallel",
    "ddp",
    "compiled on one rank",
]

# Case -> (class, code, lines that every rank's message has).
DIFFER = {
    "glob differs": (
        "PlansDiffer",
        "DC407",
        ["regions of stage 0", "stage 0, 1: a region by distckpt on ranks 0-1, 3; no region on rank 2"],
    ),
    "option differs": (
        "PlansDiffer",
        "DC407",
        ["stage 0, 0, 1, 2: a region by distckpt on ranks 0, 2-3", "determinism_check=bitwise on rank 1"],
    ),
    "differs inside a stage": (
        "PlansDiffer",
        "DC407",
        ["regions of stage 1", "stage 1, 0: a region by distckpt on rank 2; no region on rank 3"],
    ),
    "a stage nobody has": ("StageMissing", "DC408", ["no rank has stage 1", 'stages: ["2"] on ranks 2-3']),
    "mesh, tensor parallel differs": (
        "PlansDiffer",
        "DC407",
        ["regions of stage 0, regions of stage 1", "stage 1, 1: no region on rank 2"],
    ),
    "mesh without names": ("BadOption", "DC109", ["a mesh without dimension names", "ranks 0-3 of 4"]),
    "a stream more": (
        "RanksDisagree",
        "DC405",
        ["random streams: none on ranks 0-2", "random streams: router on rank 3"],
    ),
    "plan not met on one rank": (
        "PlanNotMet",
        "DC409",
        ["rank 3 of 4", "2: a region by distckpt, and in the plan no region"],
    ),
    "stage missing from the plan": ("StageMissing", "DC408", ["the plan has nothing about stage 2"]),
    "another plan passed": ("PlansDiffer", "DC407", ['regions by stage {"0":1} on rank 0']),
    "plan for another world": ("WorldChanged", "DC402", ["the plan is for 8 ranks, and there are 4"]),
    "bad plan on one rank": ("BadPlan", "DC410", ["this is no region plan", "rank 0 of 4"]),
    "device types": (
        "MixedRankDevices",
        "DC406",
        ["device type: cpu on ranks 1-3", "device type: cuda on rank 0"],
    ),
    "an unknown device": ("UnknownDeviceTypeError", "DC201", ["abacus", "rank 0 of 4"]),
    "fixed world": ("WorldChanged", "DC402", ["the coordinator is for 8 ranks, and there are 4"]),
    "rules differ": ("RanksDisagree", "DC405", ["rule: all on rank 2"]),
    "an error of no code on one rank": (
        "RankFailed",
        "DC413",
        ["a rank failed: KeyError: 'no such thing'", "rank 1 of 4"],
    ),
    "no mesh on one rank": ("BadOption", "DC109", ["mesh is a DeviceMesh", "rank 0 of 4"]),
    "no model on one rank": ("BadOption", "DC109", ["not at 'model'", "rank 2 of 4"]),
    **{
        f"model, {case}": ("ModelsDiffer", "DC414", lines)
        for case, lines in {
            "width": [
                "4 ranks differ in: model of stage 0",
                "stage 0, 1.0.weight: shape: [4, 4] on ranks 0-1, 3; [8, 4] on rank 2",
                "pass mesh=",
            ],
            "dtype": ["stage 0, 1.0.weight: dtype: float32 on ranks 0-1, 3; bfloat16 on rank 2"],
            "class": [
                "stage 0, 1.1: class: torch.nn.modules.activation.ReLU on ranks 0-1, 3; "
                "torch.nn.modules.activation.GELU on rank 2"
            ],
            "frozen": ["stage 0, 1.0.weight: requires_grad: True on ranks 0-1, 3; False on rank 2"],
            "eval": ["stage 0, 1: training: True on ranks 0-1, 3; False on rank 2"],
            "dropout": ["stage 0, 1.2: p: 0.1 on ranks 0-1, 3; 0.2 on rank 2"],
            "one block more": [
                "stage 0, 2: class: not there on ranks 0-1, 3; torch.nn.modules.linear.Linear on rank 2"
            ],
            "width along dp": ["stage 0, 1.0.weight: shape: [4, 4] on rank 0; [8, 4] on rank 2"],
            "frozen along tp": ["requires_grad: True on ranks 0-1, 3; False on rank 2"],
            "width in a stage": ["stage 1, 1.0.weight: shape: [8, 4] on rank 2; [4, 4] on rank 3"],
        }.items()
    },
    "other experts along ep": (  # rank 0 and rank 2 are at one place of ep
        "ModelsDiffer",
        "DC414",
        ["activation.ReLU on rank 0; torch.nn.modules.activation.GELU on rank 2"],
    ),
    "versions differ": ("RanksDisagree", "DC405", ["distckpt: 9.9 on rank 1"]),
}


def test_every_case_of_the_job_is_expected_here(ranks: Any) -> None:
    assert set(ranks[0]) == {*AGREED, *DIFFER, "world", "keys left"}


@pytest.mark.parametrize("case", AGREED)
def test_ranks_that_agree_get_their_part_of_the_plan(ranks: Any, case: str) -> None:
    for rank in ranks:
        assert isinstance(rank[case]["result"], str), rank[case]["result"]
        assert json.loads(rank[case]["result"])["version"] == 1


@pytest.mark.parametrize("case", DIFFER)
def test_a_disagreement_raises_the_same_coded_error_on_every_rank_with_a_diff_by_rank(
    ranks: Any, case: str
) -> None:
    kind, code, lines = DIFFER[case]
    results = [rank[case]["result"] for rank in ranks]
    assert all(result == results[0] for result in results)
    assert (results[0]["class"], results[0]["code"]) == (kind, code)
    for line in lines:
        assert line in results[0]["text"]


def test_no_check_changes_the_model(ranks: Any) -> None:
    assert all(rank[case]["untouched"] for rank in ranks for case in [*AGREED, *DIFFER])


def test_stages_are_free_to_differ_and_each_rank_returns_its_own(ranks: Any) -> None:
    stages = [json.loads(rank["stages free"]["result"])["stages"] for rank in ranks]
    assert [{name: list(regions) for name, regions in s.items()} for s in stages] == [
        {"0": ["0"]},
        {"0": ["0"]},
        {"1": ["1"]},
        {"1": ["1"]},
    ]


def test_the_rule_warn_warns_on_every_rank_and_all_says_nothing(ranks: Any) -> None:
    for rank in ranks:
        (text,) = rank["device types, warn"]["warnings"]
        assert "device type: cpu on ranks 1-3; device type: cuda on rank 0" in text
        assert rank["device types, all"]["warnings"] == []


def test_all_of_it_leaves_nothing_in_the_store(ranks: Any) -> None:
    assert ranks[0]["keys left"] in ([], None)  # None: this torch cannot list a store's keys
