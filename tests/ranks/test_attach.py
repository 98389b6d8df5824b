"""coord.attach is called on every rank: the ranks agree, or all get one error and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.spawn import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.ranks.jobs.attach", 2)


@pytest.mark.parametrize("case", ["equal", "ahead in another stage", "equal again"])
def test_ranks_with_one_plan_are_attached(ranks: Any, case: str) -> None:
    assert [rank[case].get("attached") for rank in ranks] == ["Attached(stages 0)", "Attached(stages 1)"], (
        ranks
    )
    assert [rank[case]["regions"] for rank in ranks] == [{"0": ["0", "1"]}, {"1": ["0", "1"]}]


@pytest.mark.parametrize("how", ["spelled otherwise", "by class", "by a function", "by modules"])
def test_ranks_of_one_stage_that_say_the_same_in_other_words_are_attached(ranks: Any, how: str) -> None:
    found = [rank[f"one stage, {how}"] for rank in ranks]
    assert [one.get("regions") for one in found] == [{"0": ["0", "1"]}] * 2, found


CASES = {
    "another plan": ("DC407", ["2 ranks differ in: plan", '"1":["1"]', "on rank 1"]),
    "no plan": ("DC407", ["2 ranks differ in: plan", "plan: null on rank 1"]),
    "one stage, another amount": (
        "DC407",
        ["differ in: options of stage 0", '"ahead":2147483648', '"ahead":"1 micro-batch"'],
    ),
    "one stage, a function that asks for the rank": (
        "DC407",
        ["differ in: regions of stage 0", '["0"] on rank 0', '["1"] on rank 1'],
    ),
    "an error on one rank": ("DC433", ["rank 0 of 2"]),
    "an error of no code on one rank": ("DC413", ["a rank failed: KeyError: 'not today'", "rank 1 of 2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_on_one_rank_or_differs_is_one_error_on_all_and_changes_nothing(
    ranks: Any, case: str
) -> None:
    code, lines = CASES[case]
    assert [rank[case]["code"] for rank in ranks] == [code] * 2, ranks
    assert ranks[0][case]["text"] == ranks[1][case]["text"]
    for line in lines:
        assert line in ranks[0][case]["text"]
    assert all(rank[case]["as before"] for rank in ranks)


def test_the_rank_of_an_error_has_the_error_itself_as_its_cause(ranks: Any) -> None:
    case = "an error of no code on one rank"
    assert [rank[case]["cause"] for rank in ranks] == ["None", "KeyError('not today')"]


def test_attach_starts_the_alarm_once_per_process(ranks: Any) -> None:
    assert [rank["alarms before"] for rank in ranks] == [0, 0]
    assert [rank["alarms"] for rank in ranks] == [1, 1]
