"""The random states of a job as one value: what fits is put back, what does not is refused and changes nothing."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.errors import StreamInUse, UnsavableStream, WrongState
from distckpt.ranks import rng_states
from distckpt.ranks.coordinator import Coordinator
from distckpt.ranks.rng_streams import tracker
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
    return tracker.now, torch.get_rng_state().tolist(), random.getstate()


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


class Pickles:
    """An object that a pickle can hold, and plain data cannot."""


@pytest.mark.parametrize("state", [lambda: 0, Pickles(), (1, [{"a": Pickles()}])])
def test_a_state_that_is_no_plain_data_is_refused_by_name_when_it_is_saved(state: Any) -> None:
    with dc.rng.register_source("odd", lambda: state, lambda state: None):
        with pytest.raises(UnsavableStream, match="the state of the registered random stream 'odd'") as info:
            coord.state_dict()
    assert "is no plain data" in str(info.value)


class Bomb:
    """Writes a file as soon as somebody unpickles it."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> Any:
        return Path.touch, (self.at,)


def crafted(at: Path) -> dict[str, dict[str, Any]]:
    """Checkpoints of somebody who means harm: a pickle with code wherever bytes or values are read."""
    bomb = pickle.dumps(Bomb(at))
    with dc.rng.seed_streams(None, 3):
        good = coord.state_dict()
    return {
        "version 1": {"version": 1, "world": 1, "states": bomb},
        "version 1, inner": {"version": 1, "world": 1, "states": pickle.dumps([bomb])},
        "this version": {**good, "states": bomb},
        "this version, inner": {**good, "states": rng_states.dumps([bomb])},
        "for a rank's entry": {**good, "states": rng_states.dumps([rng_states.dumps(bomb)])},
        "a whole object": {**good, "states": rng_states.dumps([rng_states.dumps({"default": bomb})])},
    }


@pytest.mark.parametrize("name", list(crafted(Path("nowhere"))))
@pytest.mark.parametrize("strict", [True, False])
def test_nothing_in_a_crafted_checkpoint_runs_and_it_is_refused_in_one_coded_sentence(
    name: str, strict: bool, tmp_path: Path
) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").exists()
    value = crafted(tmp_path / "ran")[name]
    with dc.rng.seed_streams(None, 3):
        before = everything()
        with pytest.raises(WrongState, match="DC455") as info:
            coord.load_state_dict(value, strict)
        assert everything() == before
    assert not (tmp_path / "ran").exists()
    assert info.value.fix


def test_numpys_states_are_put_back_to_the_bit() -> None:
    numpy = pytest.importorskip("numpy")
    new = numpy.random.default_rng(5).bit_generator
    mt = numpy.random.Generator(numpy.random.MT19937(5)).bit_generator
    before = numpy.random.get_state()
    try:
        with (
            dc.rng.register_source("numpy", numpy.random.get_state, numpy.random.set_state),
            dc.rng.register_source("new", lambda: new.state, lambda state: setattr(new, "state", state)),
            dc.rng.register_source("mt", lambda: mt.state, lambda state: setattr(mt, "state", state)),
        ):
            saved = coord.state_dict()
            expected = [numpy.random.rand(3).tolist(), new.random_raw(3).tolist(), mt.random_raw(3).tolist()]
            coord.load_state_dict(saved)
            again = [numpy.random.rand(3).tolist(), new.random_raw(3).tolist(), mt.random_raw(3).tolist()]
            assert again == expected
    finally:
        numpy.random.set_state(before)


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
    two = {**good, "world": 2, "states": rng_states.dumps(rng_states.loads(good["states"]) * 2)}
    return {
        "not ours": ({"a": 1}, "not what coord.state_dict"),
        "garbage": ({**good, "states": b"x"}, "not what coord.state_dict"),
        "version": ({**good, "version": 3}, "have version 3"),
        "a pickle": ({**good, "version": 1}, "have version 1, and this distckpt reads version 2"),
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
        monkeypatch.setattr(rng_states, "group_rank", lambda: 5)
        monkeypatch.setattr(rng_states, "group_size", lambda: 6)
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
