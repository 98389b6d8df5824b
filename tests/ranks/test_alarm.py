"""A replay fails on one rank of three: what the others get, wherever they are."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import on_failed_replay
from distckpt.errors import CheckpointError
from distckpt.ranks.watchdog import EXIT_CODE, raise_in
from tests.ranks.spawn import run_ranks


@pytest.fixture(scope="module", params=["collective", "meeting", "python"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks("tests.ranks.jobs.alarm", 3, request.param, "exits", check=False)


def test_the_others_get_an_error_that_names_rank_and_region_instead_of_waiting(ranks: Any) -> None:
    for rank in (0, 2):
        said = ranks[rank]["report"]
        assert said is not None, ranks[rank]["output"]
        assert said["class"] == "RemoteReplayFailed"
        assert (
            "[DC411] a replay failed on rank 1: ValueError: a replay that fails on one rank only"
            in said["text"]
        )
        assert "region the bad block" in said["text"]
        assert ranks[rank]["exit"] == 7  # the job's own handler ran


def test_the_failed_rank_has_its_own_error(ranks: Any) -> None:
    assert "own error after" in ranks[1]["report"]
    assert "RemoteReplayFailed" not in ranks[1]["output"]


def test_the_alarm_comes_as_one_error_and_not_a_second_time(ranks: Any) -> None:
    for rank in (0, 2):
        assert ranks[rank]["output"].count("distckpt: rank") <= 1
        assert "Traceback" not in ranks[rank]["output"]


def test_a_gloo_collective_that_nothing_ends_ends_the_process_with_the_error_and_a_code_of_its_own() -> None:
    ranks = run_ranks("tests.ranks.jobs.alarm", 2, "collective", "goes on", check=False)
    assert ranks[0]["exit"] == EXIT_CODE
    assert "[DC411] a replay failed on rank 1" in ranks[0]["output"]
    assert "region the bad block" in ranks[0]["output"]


def failing() -> torch.Tensor:
    def block(x: torch.Tensor) -> torch.Tensor:
        if dc.is_recomputing():
            raise ValueError("only in the replay")
        return x.sin().exp()

    return dc.checkpoint(block, torch.ones(2, requires_grad=True), name="block 7").sum()


def test_the_engine_tells_its_listeners_about_a_replay_that_raises_until_they_leave() -> None:
    heard: list[tuple[str, str]] = []
    remove = on_failed_replay(lambda region, error: heard.append((region.split(" (")[0], str(error))))
    with pytest.raises(ValueError, match="only in the replay"):
        failing().backward()
    remove()
    remove()
    with pytest.raises(ValueError, match="only in the replay"):
        failing().backward()
    assert heard == [("region block 7", "only in the replay")]


def test_the_engine_tells_about_a_mismatch_and_about_a_value_changed_in_place() -> None:
    heard: list[str] = []
    remove = on_failed_replay(lambda region, error: heard.append(type(error).__name__))
    try:
        more = dc.checkpoint(
            lambda x: x.sin() if dc.is_recomputing() else x.sin().exp(),
            torch.ones(2, requires_grad=True),
        )
        with pytest.raises(CheckpointError):
            more.sum().backward()
        weight = torch.ones(2, requires_grad=True)
        out = dc.checkpoint(lambda x: (x * weight).exp(), torch.ones(2, requires_grad=True))
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(CheckpointError):
            out.sum().backward()
    finally:
        remove()
    assert len(heard) == 2, heard


def test_a_reentrant_region_tells_as_well() -> None:
    heard: list[str] = []
    remove = on_failed_replay(lambda region, error: heard.append(type(error).__name__))

    def block(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # only its backward runs with grad
            raise ValueError("only in the replay")
        return x.sin()

    out = dc.checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=True)
    try:
        with pytest.raises(ValueError, match="only in the replay"):
            out.sum().backward()
    finally:
        remove()
    assert heard == ["ValueError"]


def test_a_listener_that_raises_does_not_hide_the_error() -> None:
    def listener(region: str, error: Exception) -> None:
        raise KeyError("a bug of the listener")

    remove = on_failed_replay(listener)
    try:
        with pytest.raises(ValueError, match="only in the replay"):
            failing().backward()
    finally:
        remove()


def test_an_exception_set_on_another_thread_lands_there() -> None:
    class Landed(Exception):
        pass

    caught: list[str] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        try:
            while True:
                time.sleep(0.01)
        except Landed:
            caught.append("landed")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    assert thread.ident is not None
    assert raise_in(thread.ident, Landed)
    thread.join(30)
    assert caught == ["landed"]
    assert raise_in(thread.ident, Landed) is False
