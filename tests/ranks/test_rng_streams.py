"""Named random streams in one process: blocks, regions, seeds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout

import distckpt as dc
from distckpt.errors import BadStreams, DrawMismatch, StreamInUse, UnknownStream
from distckpt.ranks.rng_streams import STREAMS, derive, tracker
from tests.engine.exact import exact, leaf
from tests.fakes.module import FakeModule
from tests.ranks.meshes import Mesh

stream = dc.rng.stream
Region = Callable[..., Any]
Program = Callable[[Region], list[Any]]


def tail() -> list[torch.Tensor]:
    """A draw from every stream: equal only when each one is where it should be."""
    drawn = [torch.rand(3)]
    for name in STREAMS:
        with stream(name):
            drawn.append(torch.rand(3))
    return drawn


def seeded(program: Program) -> Callable[[Region], Sequence[Any]]:
    """``program`` with fresh streams, and where they end."""

    def run(region: Region) -> Sequence[Any]:
        with dc.rng.seed_streams(None, 7):
            return [*program(region), *tail()]

    return run


def parallel(x: torch.Tensor) -> torch.Tensor:
    """Draws from three streams, from one of them twice, and saves values in between."""
    x = dropout(x.sin(), 0.5)
    with stream("tensor-parallel"):
        x = dropout(x.exp(), 0.5)
        with stream("data-parallel"):
            x = dropout(x.sin(), 0.5)
            with stream("tensor-parallel"):
                x = dropout(x.exp(), 0.5)
        x = dropout(x.sin(), 0.5)
    return dropout(x.tanh(), 0.5)


def backward(y: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(y.sum(), x, **options)
    return gradient


OPTIONS = [{}, {"early_stop": False}, {"determinism_check": "bitwise"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_region_that_enters_streams_replays_with_their_states_and_leaves_them_where_they_were(
    options: dict[str, Any],
) -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        y = region(parallel, region(parallel, x))
        between = tail()
        return [y, backward(y, x), *between]

    assert exact(seeded(program), **options).replays == 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_region_recorded_in_a_block_replays_outside_of_it(options: dict[str, Any]) -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        with stream("expert-parallel"):
            y = region(parallel, x)
            z = region(lambda t: dropout(t.sin(), 0.5).exp(), y)
        return [z, backward(z, x)]

    assert exact(seeded(program), **options).replays == 2


def test_a_region_recorded_outside_replays_in_a_block() -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        y = region(parallel, x)
        with stream("tensor-parallel"), stream("expert-parallel"):
            found = backward(y, x)
            inside = torch.rand(3)
        return [y, found, inside]

    exact(seeded(program))


def test_nested_regions_replay_in_the_streams_of_their_record() -> None:
    def outer(region: Region, x: torch.Tensor) -> torch.Tensor:
        with stream("data-parallel"):
            x = region(parallel, x)
            x = dropout(x.sin(), 0.5)
        return region(parallel, x).exp()

    def program(region: Region) -> list[Any]:
        x = leaf(50)
        y = region(outer, region, x)
        return [y, backward(y, x)]

    assert exact(seeded(program)).replays > 2


def test_a_replay_that_stops_inside_a_block_leaves_every_stream_where_it_was() -> None:
    def stops_inside(x: torch.Tensor) -> torch.Tensor:
        with stream("tensor-parallel"):
            with stream("data-parallel"):
                x = dropout(x, 0.5).sin()  # sin saves the last value: the replay ends here
            torch.rand(2)
        return x + 1

    def program(region: Region) -> list[Any]:
        x = leaf(50)
        y = region(stops_inside, x)
        return [y, backward(y, x)]

    assert exact(seeded(program)).replays == 1


def test_two_backwards_through_a_retained_graph_draw_the_same() -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        with stream("context-parallel"):
            y = region(parallel, x)
        first = backward(y, x, retain_graph=True)
        with stream("data-parallel"):
            torch.rand(1)
        return [first, backward(y, x)]

    assert exact(seeded(program)).replays == 2


def test_a_session_replays_early_without_moving_a_stream() -> None:
    with dc.rng.seed_streams(None, 7):
        torch.manual_seed(0)
        x = leaf(50)
        plain = backward(parallel(x), x)
        end = tail()
    with dc.rng.seed_streams(None, 7):
        torch.manual_seed(0)
        with dc.session() as session:
            y = dc.checkpoint(parallel, x)
        with stream("tensor-parallel"):
            assert session.replay() == 1
        assert torch.equal(backward(y, x), plain)
        session.release()
        assert all(map(torch.equal, tail(), end))


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_torchs_own_call_takes_part(options: dict[str, Any]) -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        with stream("expert-parallel"):
            y = region(parallel, x)
        y.sum().backward()
        return [y, x.grad]

    def compat(fn: Any, *args: Any) -> Any:
        return dc.compat.checkpoint(fn, *args, **options)

    torch.manual_seed(0)
    plain = seeded(program)(lambda fn, *args: fn(*args))
    torch.manual_seed(0)
    assert all(map(torch.equal, plain, seeded(program)(compat)))


def test_without_rng_preservation_a_replay_still_leaves_its_blocks_properly() -> None:
    with dc.rng.seed_streams(None, 7):
        x = leaf(50)
        with stream("tensor-parallel"):
            y = dc.checkpoint(parallel, x, preserve_rng_state=False)
        before = torch.get_rng_state()
        backward(y, x)
        assert not tracker.now.frames
        assert not torch.equal(before, torch.get_rng_state())  # as without streams: the draws go on


def test_a_replay_that_draws_otherwise_in_a_stream_is_an_error() -> None:
    def draws(x: torch.Tensor) -> torch.Tensor:
        with stream("tensor-parallel"):
            torch.rand(2 if dc.is_recomputing() else 1)
        return x.sin()

    with dc.rng.seed_streams(None, 7):
        x = leaf(5)
        y = dc.checkpoint(draws, x, early_stop=False)
        with pytest.raises(DrawMismatch, match="named streams"):
            backward(y, x)


def test_regions_share_what_is_parked_while_nobody_draws_from_a_stream() -> None:
    with dc.rng.seed_streams(None, 7):
        before = tracker.get_state()
        dc.checkpoint(torch.sin, leaf(5))
        with stream("tensor-parallel"):
            pass
        assert not tracker.moved(before)
        with stream("tensor-parallel"):
            torch.rand(1)
        assert tracker.moved(before)


def test_a_block_leaves_the_default_generator_where_it_was_also_after_an_exception() -> None:
    with dc.rng.seed_streams(None, 7):
        before = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            with stream("tensor-parallel"), stream("data-parallel"):
                torch.rand(3)
                raise ZeroDivisionError
        assert torch.equal(torch.get_rng_state(), before)
        assert not tracker.now.frames


def test_a_region_that_fails_inside_a_block_leaves_the_streams_in_order() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        with stream("tensor-parallel"):
            y = dropout(x, 0.5).sin().exp()
            if dc.is_recomputing():
                raise ZeroDivisionError
        return y

    with dc.rng.seed_streams(None, 7):
        x = leaf(5)
        y = dc.checkpoint(fails, x, early_stop=False)
        parked, state = tracker.get_state(), torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            backward(y, x)
        assert tracker.get_state() is parked
        assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_continues_where_its_last_block_ended() -> None:
    with dc.rng.seed_streams(None, 7):
        with stream("tensor-parallel"):
            whole = torch.rand(6)
    with dc.rng.seed_streams(None, 7):
        parts = []
        for _ in range(2):
            with stream("tensor-parallel"):
                parts.append(torch.rand(3))
            torch.rand(5)
    assert torch.equal(whole, torch.cat(parts))


def test_a_stream_entered_again_inside_its_own_block_goes_on() -> None:
    with dc.rng.seed_streams(None, 7), stream("tensor-parallel"):
        whole = torch.rand(6)
    with dc.rng.seed_streams(None, 7), stream("tensor-parallel"):
        first = torch.rand(2)
        with stream("tensor-parallel"):
            second = torch.rand(2)
        third = torch.rand(2)
    assert torch.equal(whole, torch.cat([first, second, third]))


def test_streams_of_an_earlier_seeding_serve_the_regions_recorded_under_them() -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        with dc.rng.seed_streams(None, 7):
            y = region(parallel, x)
        with dc.rng.seed_streams(None, 8):
            return [backward(y, x), *tail()]

    exact(program)
    x = leaf(5)
    with dc.rng.seed_streams(None, 7):
        y = dc.checkpoint(parallel, x)
    backward(y, x)  # also when there is none any more


def test_the_devices_generators_are_switched_too(lazy: FakeModule) -> None:
    with dc.rng.seed_streams(None, 7):
        before = [g.get_state() for g in lazy.default_generators]
        with stream("tensor-parallel"):
            a = torch.rand(3, device="lazy:1")
        assert all(
            torch.equal(g.get_state(), s) for g, s in zip(lazy.default_generators, before, strict=True)
        )
        with stream("data-parallel"):
            b = torch.rand(3, device="lazy:1")
        with stream("tensor-parallel"):
            c = torch.rand(3, device="lazy:1")
    drawn = [t.cpu().tolist() for t in (a, b, c)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_a_device_region_that_enters_a_stream_is_exact(lazy: FakeModule) -> None:
    def run(region: Region) -> list[list[float]]:
        lazy.manual_seed_all(1)
        x = torch.ones(20, device="lazy", requires_grad=True)
        with dc.rng.seed_streams(None, 7):
            y = region(parallel, x)
            found = backward(y, x)
            with stream("tensor-parallel"):
                end = torch.rand(3, device="lazy")
        return [y.detach().cpu().tolist(), found.cpu().tolist(), end.cpu().tolist()]

    assert run(lambda fn, x: fn(x)) == run(dc.checkpoint)


def test_a_device_that_comes_up_inside_a_block_is_refused(lazy: FakeModule) -> None:
    lazy._initialized = False
    with dc.rng.seed_streams(None, 7):
        state = torch.get_rng_state()
        with pytest.raises(StreamInUse, match="lazy:0, lazy:1 was initialised inside a block"):
            with stream("tensor-parallel"):
                torch.rand(1)
                lazy._initialized = True
        assert not tracker.now.frames
        assert torch.equal(state, torch.get_rng_state())


def test_a_stream_that_nobody_seeded_is_refused_and_the_others_are_named() -> None:
    with pytest.raises(UnknownStream, match="no random stream named 'router'") as info:
        with stream("router"):
            pass
    assert info.value.why == "seeded here: none"
    with dc.rng.seed_streams(None, 7), pytest.raises(UnknownStream) as info:
        with stream("default"):
            pass
    assert info.value.why is not None
    assert "tensor-parallel" in info.value.why


def test_a_block_of_another_thread_is_refused() -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with stream("data-parallel"):
                pass
        except StreamInUse as error:
            found.append(error)

    with dc.rng.seed_streams(None, 7):
        with stream("tensor-parallel"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert tracker.now.current == "tensor-parallel"
        assert len(found) == 1
        thread = threading.Thread(target=other)  # while no block is open, any thread may
        thread.start()
        thread.join()
    assert len(found) == 1


def test_a_replay_on_another_thread_enters_the_streams_of_its_record() -> None:
    def program(region: Region) -> list[Any]:
        x = leaf(50)
        with stream("expert-parallel"):
            y = region(parallel, x)
        found: list[torch.Tensor] = []
        with stream("data-parallel"):
            thread = threading.Thread(target=lambda: found.append(backward(y, x)))
            thread.start()
            thread.join()
        return found

    exact(seeded(program))


def test_blocks_left_in_another_order_are_refused() -> None:
    with dc.rng.seed_streams(None, 7):
        a, b = stream("tensor-parallel"), stream("data-parallel")
        a.__enter__()
        b.__enter__()
        with pytest.raises(StreamInUse, match="'tensor-parallel' was left while 'data-parallel'"):
            tracker.leave(a._frames[0])
        b.__exit__(None, None, None)
        a.__exit__(None, None, None)


def test_streams_are_neither_seeded_nor_removed_inside_a_block() -> None:
    with dc.rng.seed_streams(None, 7) as handle:
        with stream("tensor-parallel"):
            for call in (lambda: dc.rng.seed_streams(None, 1), handle.remove, dc.rng.check_streams):
                with pytest.raises(StreamInUse, match="inside a block of stream 'tensor-parallel'"):
                    call()


def test_without_named_streams_the_engine_has_none_to_stash() -> None:
    assert dc.rng.registered() == ()
    handle = dc.rng.seed_streams(None, 7)
    assert [s.name for s in dc.rng.registered()] == ["named streams"]
    handle.remove()
    handle.remove()
    assert dc.rng.registered() == ()


@pytest.mark.filterwarnings("ignore")  # of Dynamo, whose warnings differ from version to version
@pytest.mark.parametrize("inside", [False, True], ids=["compiled function", "region in compiled code"])
def test_a_block_breaks_a_compiled_graph_and_draws_from_its_stream(inside: bool) -> None:
    def program(region: Region) -> list[Any]:
        torch.compiler.reset()
        x = leaf(50)
        if region is dc.checkpoint and inside:
            y = torch.compile(lambda x: dc.checkpoint(parallel, x) * 1, backend="eager")(x)
        else:
            y = region(torch.compile(parallel, backend="eager"), x) * 1
        return [y, backward(y, x)]

    torch.manual_seed(0)
    plain = seeded(program)(lambda fn, *args: fn(*args))
    torch.manual_seed(0)
    assert all(map(torch.equal, plain, seeded(program)(dc.checkpoint)))


# Seeds ------------------------------------------------------------------------------------------------------


DIMS = ("dp", "pp", "cp", "ep", "tp")
PROMISES = {
    "data-parallel": {"dp", "pp"},
    "context-parallel": {"cp", "dp", "pp"},
    "tensor-parallel": {"tp", "cp", "dp", "pp"},
    "expert-parallel": {"ep", "tp", "cp", "dp", "pp"},
}


@pytest.mark.parametrize("name", PROMISES)
def test_a_stream_differs_over_the_dims_of_its_name_and_over_no_other(name: str) -> None:
    seeds: dict[tuple[int, ...], int] = {}
    for at in itertools.product(range(2), repeat=5):
        with dc.rng.seed_streams(Mesh(DIMS, at), 3):
            seeds[at] = tracker.now.streams[name].seed
    for a, b in itertools.combinations(seeds, 2):
        apart = {dim for dim, i, j in zip(DIMS, a, b, strict=True) if i != j}
        assert (seeds[a] != seeds[b]) == bool(apart & PROMISES[name]), (a, b)


def test_seeds_of_neighbours_never_meet() -> None:
    places = itertools.product(STREAMS, range(12), range(12), range(12), range(3))
    seeds = [derive(seed, name, [("dp", d), ("pp", p), ("tp", t)]) for name, d, p, t, seed in places]
    assert len(set(seeds)) == len(seeds) == 4 * 12**3 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_version() -> None:
    assert derive(3, "tensor-parallel", [("tp", 1), ("dp", 0)]) == 1219472873669132804


def test_several_dims_may_have_one_meaning() -> None:
    seeds = set()
    for at in itertools.product(range(2), repeat=3):
        with dc.rng.seed_streams(Mesh(("dp_replicate", "dp_shard", "model"), at), 3):
            seeds.add(tracker.now.streams["data-parallel"].seed)
    assert len(seeds) == 4  # two times two data-parallel places; equal over "model"


def test_streams_of_your_own_say_over_which_dims_they_differ() -> None:
    seeds = []
    for at in itertools.product(range(2), repeat=2):
        mesh = Mesh(("rows", "tp"), at)
        with dc.rng.seed_streams(mesh, 3, streams={"router": ("rows",)}) as handle:
            assert handle.names == ("router",)
            seeds.append(tracker.now.streams["router"].seed)
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_a_second_seeding_adds_streams() -> None:
    with dc.rng.seed_streams(Mesh(("tp",), (0,)), 3), dc.rng.seed_streams(None, 3, streams={"router": ()}):
        assert set(tracker.names()) == {*STREAMS, "router"}


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((Mesh(None, (0,)), 3), {}, "dims have names"),
        ((Mesh(("tp",), None), 3), {}, "is not in the mesh"),
        ((Mesh(("tp", "rows"), (0, 0)), 3), {}, "'rows' has no meaning"),
        ((None, 3.0), {}, "is an int, not a float"),
        ((None, True), {}, "is an int, not a bool"),
        ((None, 3), {"streams": {"default": ()}}, "table of names"),
        ((None, 3), {"streams": {"router": "dp"}}, "table of names"),
    ],
)
def test_what_cannot_be_seeded_is_refused_and_nothing_is_seeded(
    arguments: Any, options: Any, match: str
) -> None:
    with pytest.raises(BadStreams, match=match):
        dc.rng.seed_streams(*arguments, **options)
    assert tracker.names() == []


class Tracker:
    """As DTensor's tracker, with states of its own as some versions have."""

    def __init__(self) -> None:
        self.distribute_region_enabled = True
        self.rng_states = {"parallel-rng": torch.zeros(2)}


def test_dtensors_tracker_is_stashed_with_every_region(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import _random

    tracker: Any = Tracker()
    monkeypatch.setattr(_random, "_rng_tracker", tracker)
    seen: list[tuple[bool, float]] = []

    def draws(x: torch.Tensor) -> torch.Tensor:
        seen.append((tracker.distribute_region_enabled, float(tracker.rng_states["parallel-rng"][0])))
        tracker.rng_states["parallel-rng"] += 1
        return x.sin().exp()

    with dc.rng.seed_streams(Mesh(("tp",), (0,)), 3):
        x = leaf(5)
        tracker.distribute_region_enabled = False
        y = dc.checkpoint(draws, x)
        tracker.distribute_region_enabled = True
        tracker.rng_states["parallel-rng"] += 10
        backward(y, x)
    assert seen == [(False, 0.0), (False, 0.0)]
    assert tracker.distribute_region_enabled
    assert tracker.rng_states["parallel-rng"].tolist() == [11.0, 11.0]
    assert dc.rng.registered() == ()


def test_the_tracker_is_made_with_the_streams_and_without_broadcasting_rank_zeros_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.distributed.tensor import _random

    made: list[bool] = []

    def make(mesh: Any, run_state_sync: bool = True) -> Tracker:
        made.append(run_state_sync)
        return Tracker()

    monkeypatch.setattr(_random, "_rng_tracker", None)
    monkeypatch.setattr(_random, "is_rng_supported_mesh", lambda mesh: mesh.device_type != "cpu")
    monkeypatch.setattr(_random, "OffsetBasedRNGTracker", make)
    with dc.rng.seed_streams(Mesh(("tp",), (0,), "cpu"), 3):
        assert [s.name for s in dc.rng.registered()] == ["named streams"]
    for _ in range(2):  # there is one per process
        with dc.rng.seed_streams(Mesh(("tp",), (0,), "cuda"), 3):
            assert {s.name for s in dc.rng.registered()} == {"named streams", "DTensor tracker"}
    assert dc.rng.registered() == ()
    assert made == [False]


def test_an_alias_gives_a_strange_dim_its_meaning() -> None:
    with dc.rng.seed_streams(Mesh(("tp", "rows"), (0, 1)), 3, aliases={"rows": "dp"}):
        assert tracker.now.streams["data-parallel"].coordinates == (("rows", 1),)
