"""By default a pipeline needs no more memory than with torch's engine: live bytes of every schedule."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.jobs.pipeline import SCHEDULES
from tests.ranks.jobs.pipeline_peaks import BLOCKS, SPLIT
from tests.ranks.jobs.pipeline_peaks import RUNS as JOBS
from tests.ranks.spawn import run_ranks

REGION = 49_408  # bytes that a block's replay makes
RUNS = [f"{case}, {name}" for case, name in JOBS]


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], scope="module")
def found(request: pytest.FixtureRequest) -> list[Any]:
    return run_ranks("tests.ranks.jobs.pipeline_peaks", request.param, timeout=600)


def runs(found: list[Any], *schedules: str) -> list[str]:
    """On 4 ranks the plain case, and MLPs where a backward is split."""
    return [run for run in RUNS if run in found[0] and (not schedules or run.split(", ")[1] in schedules)]


def test_the_default_never_peaks_above_torchs_engine(found: list[Any]) -> None:
    over = {
        (run, index): rank[run]["default"]["peak"] - rank[run]["torch"]["peak"]
        for run in runs(found)
        for index, rank in enumerate(found)
    }
    assert {where: more for where, more in over.items() if more > 0} == {}
    assert len(over) == (len(RUNS) if len(found) == 2 else len(SCHEDULES) + len(SPLIT)) * len(found)


def test_the_default_is_early_where_that_costs_nothing(found: list[Any]) -> None:
    for run in runs(found, "GPipe", "1F1B"):
        early = [count for rank in found for count in rank[run]["default"]["early"].values()]
        # what follows the regions of that stage is in memory until its gradient comes
        each = 0 if "long way" in run else 2 * len(found)
        assert early == [each] * (len(found) - 1) + [0]


def test_one_micro_batch_ahead_costs_the_other_regions_of_one(found: list[Any]) -> None:
    first = found[0]["plain, 1F1B"]
    assert 0 < first["1 micro-batch"]["peak"] - first["torch"]["peak"] <= (BLOCKS - 1) * REGION


def test_the_gradients_are_those_of_torchs_engine(found: list[Any]) -> None:
    for run in runs(found):
        for rank in found:
            assert rank[run]["default"]["grads"] == rank[run]["torch"]["grads"]


@pytest.mark.skipif("ZBVZeroBubble" not in SCHEDULES, reason="gloo cannot run it on this torch")
def test_values_for_weights_pile_up_only_as_far_as_torchs_replays_do_unless_asked(found: list[Any]) -> None:
    if len(found) == 4:
        early = [rank["plain, ZBVZeroBubble"]["default"]["weights early"] for rank in found]
        assert early[:2] == [0, 0]
        assert early[3] > 0  # eight micro-batches of its two stages would wait
        return
    for name in SPLIT:
        assert [rank[f"plain, {name}"]["default"]["weights early"] for rank in found] == [0, 0]
    early = {name: [rank[f"mlp, {name}"]["default"]["weights early"] for rank in found] for name in SPLIT}
    # the last weight half of a stage as well: with DualPipeV it is the only one that waits beside another
    assert early == {"InterleavedZeroBubble": [0, 7], "ZBVZeroBubble": [0, 2], "DualPipeV": [0, 1]}
    run = [rank["mlp, ZBVZeroBubble"] for rank in found]
    assert [ways["1 micro-batch"]["weights early"] for ways in run] == [0, 0]
    assert run[1]["1 micro-batch"]["peak"] > run[1]["torch"]["peak"]
