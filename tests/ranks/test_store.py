"""Meetings at the store: what they cost, what they leave behind, and what a missing rank does to them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import distckpt as dc
from distckpt.errors import PlansDiffer, RanksMissing, RemoteReplayFailed
from distckpt.ranks import World
from distckpt.ranks.store import Channel, Verdict, _pack, spans
from tests.ranks.threads import CountingStore, on_ranks


def model(layers: int, regions: Any = "*") -> nn.Module:
    made = nn.Sequential(*[nn.Sequential(nn.Linear(1, 1)) for _ in range(layers)])
    dc.apply(made, regions)
    return made


def checked(world: World, store: Any, made: Any) -> CountingStore:
    counting = CountingStore(store)
    dc.Coordinator(world=world, store=counting, alarm=False).check(made)
    return counting


MEMBER = ["add", "set", "wait", "get", "delete_key", "add"]
COMPARES = ["compare_set", "wait", "multi_get", "compare_set"]  # claim, see that all is there, read, publish
JUDGE = ["add", "set", *COMPARES, "wait", "get", "delete_key", "add"]
LAST = ["delete_key"] * 4  # the last to leave clears the table


@pytest.mark.parametrize("size", [2, 8, 64])
def test_a_check_costs_six_requests_per_rank_and_one_judge_whatever_the_worlds_size(size: int) -> None:
    counts = on_ranks(size, lambda world, store: checked(world, store, model(3)), run_id=f"cost {size}")
    sequences = [count.requests for count in counts]
    assert sum(s[: len(JUDGE)] == JUDGE for s in sequences) == 1
    for sequence in sequences:
        body = JUDGE if "multi_get" in sequence else MEMBER
        assert sequence[: len(body)] == body
        assert sequence[len(body) :] in ([], LAST)
    assert sum(len(s) for s in sequences) == 6 * size + 4 + 4


class Cloned:
    """A store that notes which thread asks it for a connection."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.by: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "clone":
            self.by.append(threading.current_thread().name)
        return getattr(self.store, name)


def test_a_check_with_the_alarm_makes_the_same_requests_as_one_without_and_no_connection() -> None:
    stores: dict[int, Cloned] = {}

    def run(world: World, store: Any) -> list[str]:
        stores[world.rank] = Cloned(store)
        counting = CountingStore(stores[world.rank])
        with dc.Coordinator(world=world, store=counting) as coord:
            coord.check(model(3))
            own = [name for name in counting.requests if name != "clone"]  # what the alarm's thread asks for
            end = time.monotonic() + 60
            while not stores[world.rank].by and time.monotonic() < end:
                time.sleep(0.01)
        return own

    for sequence in on_ranks(4, run, run_id="alarm"):
        body = JUDGE if "multi_get" in sequence else MEMBER
        assert sequence[: len(body)] == body
    assert {rank: store.by for rank, store in stores.items()} == {
        rank: ["distckpt-alarm"] for rank in range(4)
    }


def test_coordinators_of_one_process_share_one_alarm_and_the_last_to_close_ends_it() -> None:
    def run(world: World, store: Any) -> None:
        one, two = (dc.Coordinator(world=world, store=store) for _ in range(2))
        for coord in (one, two, one):
            coord.check(model(1))
        alarm = one._alarm
        assert alarm is not None
        assert two._alarm is alarm
        one.close()
        one.close()
        assert alarm.watches()
        two.close()
        assert not alarm.watches()
        one.check(model(1))
        assert one._alarm is not alarm
        one.close()

    assert on_ranks(2, run, run_id="one alarm") == [None] * 2


def test_the_message_is_as_small_for_a_thousand_regions_as_for_one() -> None:
    small, large = (
        on_ranks(2, lambda world, store, n=n: checked(world, store, model(n)), run_id=f"layers {n}")
        for n in (1, 1000)
    )

    def message(counts: list[CountingStore]) -> int:
        (member,) = [count for count in counts if "multi_get" not in count.requests]
        return member.sent

    assert message(small) == message(large) < 500


def test_the_judge_reads_one_message_per_rank_in_one_request_and_the_others_read_a_verdict_of_two_bytes() -> (
    None
):
    counts = on_ranks(8, lambda world, store: checked(world, store, model(3)), run_id="bytes")
    (judge,) = [count for count in counts if "multi_get" in count.requests]
    members = [count for count in counts if count is not judge]
    assert {count.received for count in members} == {2}
    assert judge.requests.count("multi_get") == 1
    assert judge.received == 8 * members[0].sent + 2
    assert judge.sent == members[0].sent + 1 + 2  # the rank that judges, and the verdict


def test_nothing_stays_in_the_store_after_agreement_or_disagreement() -> None:
    store = dist.HashStore()

    def run(world: World, own: Any) -> None:
        coord = dc.Coordinator(world=world, store=own, alarm=False)
        coord.check(model(2))
        with pytest.raises(PlansDiffer):
            coord.check(model(2, "0" if world.rank else "1"))

    assert on_ranks(4, run, run_id="clean", store=store) == [None] * 4
    assert store.num_keys() == 0


def test_the_long_text_is_sent_only_on_disagreement_and_only_by_one_rank_of_each_opinion() -> None:
    def run(world: World, own: Any) -> CountingStore:
        counting = CountingStore(own)
        with pytest.raises(PlansDiffer):
            dc.Coordinator(world=world, store=counting, alarm=False).check(
                model(500, "*" if world.rank < 6 else ["*", "*.*"])
            )
        return counting

    counts = on_ranks(8, run, run_id="texts")
    long = [rank for rank, count in enumerate(counts) if count.sent > 2000]
    assert len(long) == 2
    assert sum(rank >= 6 for rank in long) == 1


@pytest.mark.parametrize("restart", [0, 1])
def test_keys_of_an_earlier_restart_are_never_read(restart: int) -> None:
    store = dist.HashStore()
    job = f"elastic {restart}"
    old = f"distckpt/{job}/0/check/0"
    store.set(f"{old}/say/0", "left by a round that died")
    store.add(f"{old}/here", 1)
    store.set(f"{old}/judge", "0")
    store.set(f"{old}/verdict", _pack(Verdict.of(RanksMissing("of the round before"))))

    def run(world: World, own: Any) -> Any:
        return dc.Coordinator(world=world, store=own, alarm=False, timeout=1).check(model(1)).hash

    results = on_ranks(2, run, run_id=job, restart=restart, store=store)
    if restart:
        assert results[0] == results[1]
    else:  # the same round again would have been misled
        assert {str(result) for result in results} == {"[DC404] of the round before"}


def test_checks_of_two_coordinators_in_one_process_do_not_meet() -> None:
    def run(world: World, own: Any) -> None:
        one = dc.Coordinator(world=world, store=own, alarm=False)
        two = dc.Coordinator(world=world, store=own, alarm=False)
        if world.rank == 0:  # a coordinator more on one rank is no meeting more
            dc.Coordinator(world=world, store=own, alarm=False)
        for _ in range(3):
            one.check(model(1))
            two.check(model(2))

    assert on_ranks(3, run, run_id="two coordinators") == [None] * 3


def test_missing_ranks_are_named_on_every_rank_that_waits() -> None:
    def run(world: World, own: Any) -> None:
        if world.rank not in (1, 4, 5):
            dc.Coordinator(world=world, store=own, alarm=False, timeout=0.5).check(model(1))

    results = on_ranks(6, run, run_id="missing")
    errors = [result for result in results if result is not None]
    assert len(errors) == 3
    assert {type(error) for error in errors} == {RanksMissing}
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "ranks 1, 4-5 did not come to check 1 within 0.5 s" in str(errors[0])


def test_a_rank_that_comes_after_the_timeout_gets_the_same_error_at_once() -> None:
    def run(world: World, own: Any) -> float:
        if world.rank == 1:
            time.sleep(2)
        start = time.monotonic()
        with pytest.raises(RanksMissing, match="rank 1 did not come"):
            dc.Coordinator(world=world, store=own, alarm=False, timeout=0.5).check()
        return time.monotonic() - start

    results = on_ranks(2, run, run_id="late")
    assert all(isinstance(result, float) for result in results), results


def test_a_fault_in_the_comparison_itself_reaches_every_rank() -> None:
    fault = KeyError("a bug")

    def judge(messages: Any, texts: Any) -> Verdict:
        raise fault

    def run(world: World, own: Any) -> None:
        Channel(own, world).meet("bug", b"x", judge, timeout=30).raise_error()

    results = on_ranks(3, run, run_id="bug")
    assert [result.code for result in results] == ["DC413"] * 3
    assert "comparing failed: a rank failed: KeyError: 'a bug'" in str(results[0])
    assert [result.__cause__ for result in results].count(fault) == 1  # where it happened


def test_a_meeting_can_be_ended_from_another_thread() -> None:
    store = dist.HashStore()
    channel = Channel(store.clone(), World(0, 2, run="interrupt"))
    error = RemoteReplayFailed("a replay failed on rank 1")
    ended: list[bool] = []

    def interrupt() -> None:
        while not channel._waiting:
            time.sleep(0.01)
        ended.append(channel.interrupt(store.clone(), Verdict.of(error)))

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RemoteReplayFailed, match="rank 1"):
        channel.meet("x", b"", lambda messages, texts: Verdict(), timeout=60)
    thread.join()
    assert ended == [True]
    assert channel.interrupt(store, Verdict.of(error))  # it knows already, and needs no second error
    assert not Channel(store, World(0, 2, run="not waiting")).interrupt(store, Verdict.of(error))


def test_a_file_store_serves_as_well(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    results = on_ranks(
        2, lambda world, own: checked(world, own, model(1)).requests[0], run_id="file", store=store
    )
    assert results == ["add", "add"]


def test_errors_cross_ranks_with_their_class_and_their_parts() -> None:
    from distckpt import errors

    found = [kind for kind in vars(errors).values() if getattr(kind, "code", "DC000") != "DC000"]
    for kind in found:
        with pytest.raises(kind) as caught:
            Verdict.of(kind("what", "where", "why", "fix")).raise_error()
        assert str(caught.value) == str(kind("what", "where", "why", "fix"))
    assert len(found) > 10
    json.dumps(Verdict.of(found[0]("x")).error)


def test_spans_are_how_people_write_ranks() -> None:
    assert spans([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"
    assert spans([5]) == "5"
    assert spans([]) == ""
