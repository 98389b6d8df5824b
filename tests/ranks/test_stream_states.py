"""The random states of a job as one value: what fits is put back, what does not is refused and changes nothing."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.ranks import exchange
from distckpt.ranks.coordinator import Coordinator
from distckpt.ranks.streams_errors import StreamInUse, UnsavableStream, WrongState
from distckpt.ranks.switch import switch
from tests.fakes.module import FakeModule
from tests.ranks.meshes import Mesh

coord = Coordinator()


def draw(*names: str) -> list[list[float]]:
    found = [torch.rand(3).tolist()]
    for name in names:
        with dc.rng.stream(name):
            found.append(torch.rand(3).tolist())
    return found


def everything() -> tuple[Any, ...]:
    return switch.now, torch.get_rng_state().tolist(), random.getstate()


def test_every_stream_continues_where_it_was() -> None:
    source = torch.Generator().manual_seed(1)
    with (
        dc.rng.seed_streams(None, 3),
        dc.rng.register("router", source),
        dc.rng.register_source("python", random.getstate, random.setstate),
    ):
        draw("tensor-parallel")
        saved = coord.state_dict()
        expected = [draw("tensor-parallel", "data-parallel"), source.get_state().tolist(), random.random()]
        torch.manual_seed(9)
        source.manual_seed(9)
        random.seed(9)
        dc.rng.seed_streams(None, 3)
        coord.load_state_dict(saved)
        assert [
            draw("tensor-parallel", "data-parallel"),
            source.get_state().tolist(),
            random.random(),
        ] == expected


def test_the_value_survives_torch_save_in_its_safe_mode(tmp_path: Any) -> None:
    with dc.rng.seed_streams(None, 3):
        torch.save(coord.state_dict(), tmp_path / "random.pt")
        expected = draw("tensor-parallel")
        coord.load_state_dict(torch.load(tmp_path / "random.pt", weights_only=True))
        assert draw("tensor-parallel") == expected


def test_a_stream_that_nobody_drew_from_costs_no_state() -> None:
    with dc.rng.seed_streams(None, 3):
        before = len(coord.state_dict()["states"])
        draw("tensor-parallel")
        assert before < 5056 + 1500 < len(coord.state_dict()["states"])


def test_devices_are_saved_and_put_back(lazy: FakeModule) -> None:
    with dc.rng.seed_streams(None, 3):
        with dc.rng.stream("tensor-parallel"):
            torch.rand(2, device="lazy:1")
        saved = coord.state_dict()

        def end() -> list[Any]:
            with dc.rng.stream("tensor-parallel"):
                inside = torch.rand(2, device="lazy:1").cpu().tolist()
            return [inside, torch.rand(2, device="lazy:0").cpu().tolist()]

        expected = end()
        lazy.manual_seed_all(77)
        coord.load_state_dict(saved)
        assert end() == expected
        lazy._initialized = False
        with pytest.raises(WrongState, match="devices of stream 'tensor-parallel' of rank 0") as info:
            coord.load_state_dict(saved)
        assert info.value.why == "saved and not here: lazy:1"


def test_a_state_that_cannot_be_pickled_is_refused_by_name() -> None:
    with dc.rng.register_source("odd", lambda: lambda: 0, lambda state: None):
        with pytest.raises(UnsavableStream, match="rank 0: the state of the registered random stream 'odd'"):
            coord.state_dict()


def refusals() -> dict[str, Any]:
    """Values that do not fit a job of one rank with the default streams, and what is said."""
    with dc.rng.seed_streams(None, 3):
        good = coord.state_dict()
    with dc.rng.seed_streams(None, 3, streams={"router": ()}):
        streams = coord.state_dict()
    with dc.rng.seed_streams(None, 4):
        seed = coord.state_dict()
    with dc.rng.seed_streams(Mesh(("tp",), (1,)), 3):
        place = coord.state_dict()
    with dc.rng.seed_streams(None, 3), dc.rng.register("mine", torch.Generator()):
        registered = coord.state_dict()
    two = {**good, "world": 2, "states": pickle.dumps(pickle.loads(good["states"]) * 2)}
    return {
        "not ours": ({"a": 1}, "not what coord.state_dict"),
        "garbage": ({**good, "states": b"x"}, "not what coord.state_dict"),
        "version": ({**good, "version": 2}, "have version 2"),
        "world": (two, "are of 2 ranks, and this job has 1"),
        "streams": (streams, "named streams of rank 0 are not those"),
        "seed": (seed, "was saved with seed 4"),
        "place": (place, "saved with seed 3 at {'tp': 1}"),
        "registered": (registered, "registered random streams of rank 0 are not those"),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_does_not_fit_is_refused_and_nothing_changes(name: str) -> None:
    value, message = refusals()[name]
    with dc.rng.seed_streams(None, 3):
        draw("tensor-parallel")
        before = everything()
        with pytest.raises(WrongState, match=message):
            coord.load_state_dict(value)
        assert everything()[0] is before[0]
        assert everything()[1:] == before[1:]


def test_a_source_that_refuses_its_state_leaves_the_others_as_they_were() -> None:
    def refuse(state: Any) -> None:
        if state != now[0]:
            raise ZeroDivisionError

    now = [1]
    with dc.rng.register_source("odd", lambda: now[0], refuse):
        saved = coord.state_dict()
        torch.rand(5)
        now[0] = 2
        before = everything()
        with pytest.raises(ZeroDivisionError):
            coord.load_state_dict(saved)
        assert everything()[1:] == before[1:]


@pytest.mark.parametrize(("name", "continues"), [("seed", False), ("place", False), ("world", True)])
def test_loosely_loaded_streams_continue_only_where_seed_and_place_agree(name: str, continues: bool) -> None:
    value, _ = refusals()[name]
    with dc.rng.seed_streams(None, 3):
        fresh = draw("tensor-parallel")[1]
        coord.load_state_dict(value, strict=False)
        assert (draw("tensor-parallel")[1] == fresh) is True  # all of the saved ones stood at their seed
    drawn = {"seed": 4, "world": 3, "place": 3}
    with dc.rng.seed_streams(Mesh(("tp",), (1,)) if name == "place" else None, drawn[name]):
        draw("tensor-parallel")
        saved = coord.state_dict()
        expected = draw("tensor-parallel")[1]
    with dc.rng.seed_streams(None, 3):
        coord.load_state_dict(saved, strict=False)
        assert (draw("tensor-parallel")[1] == expected) is continues


def test_a_rank_that_the_saved_job_did_not_have_keeps_its_own_generators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with dc.rng.seed_streams(None, 3):
        draw("data-parallel")
        saved = coord.state_dict()
        expected = draw("data-parallel")[1]
        torch.manual_seed(31)
        own = torch.rand(3).tolist()
        torch.manual_seed(31)
        monkeypatch.setattr(exchange, "rank", lambda: 5)
        monkeypatch.setattr(exchange, "world", lambda: 6)
        coord.load_state_dict(saved, strict=False)
        assert draw("data-parallel") == [own, expected]


def test_states_are_neither_saved_nor_loaded_inside_a_block() -> None:
    with dc.rng.seed_streams(None, 3):
        saved = coord.state_dict()
        with dc.rng.stream("tensor-parallel"):
            with pytest.raises(StreamInUse, match="cannot be saved inside"):
                coord.state_dict()
            with pytest.raises(StreamInUse, match="cannot be loaded inside"):
                coord.load_state_dict(saved)
