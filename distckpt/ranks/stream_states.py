"""The random states of all ranks as one value: what ``coord.state_dict()`` gives and ``load_state_dict()`` takes.

Note [One value for all ranks]
    ``torch.distributed.checkpoint`` takes equal keys of different ranks for copies and keeps one of them, so states
    of ranks under one key would all become one rank's. A key per rank avoids that, but a job on another number of
    ranks then fails on a missing key before anybody can say why. So every rank gathers the states of all and gives
    the same value: whichever copy is kept, it holds every rank's. It is about 5 KB per rank, stream and device type
    on which something was drawn (16 bytes on CUDA), and a few hundred bytes for a stream that nobody drew from.

Note [A checkpoint is data]
    What is saved is plain data (``plain_data.py``), not a pickle: whoever can write a checkpoint could otherwise run
    code in the job that loads it. Version 1 was a pickle, and is not read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from distckpt.engine import streams as engine_streams
from distckpt.engine.rng import Generator
from distckpt.errors import UnsavableStream, WrongState
from distckpt.ranks import plain_data
from distckpt.ranks.plain_data import NotPlain
from distckpt.ranks.store import gather
from distckpt.ranks.switch import DEFAULT, Stream, generators, switch
from distckpt.ranks.world import group_rank, group_size

_VERSION = 2


def own_state() -> bytes:
    """The states of every random stream of this rank, as plain data.

    Raises:
        UnsavableStream: the state of a source is no plain data (DC454).
        StreamInUse: inside a block of a stream (DC451).
    """
    switch.refuse_inside("saved")
    return plain_data.dumps(_mine())


def together(mine: bytes) -> dict[str, Any]:
    """What every rank has as its :func:`own_state`, as one value. A collective: every rank calls it.

    Returns:
        ``{"version": int, "world": int, "states": bytes}``, equal on all ranks; ``states`` is plain data, one
        entry per global rank: its default generators, named streams and registered generators and sources.
    """
    everyone = gather(mine)
    return {"version": _VERSION, "world": len(everyone), "states": plain_data.dumps(everyone)}


def _mine() -> dict[str, Any]:
    keys = _keys()
    registered: dict[str, Any] = {}
    for source in _registered():
        registered[source.name] = source.get_state()
        try:
            plain_data.dumps(registered[source.name])
        except NotPlain as error:
            raise UnsavableStream(
                f"the state of the registered random stream {source.name!r} is no plain data",
                why=f"{error}; a checkpoint is read as data, so that nothing in it can run",
                fix="let get_state() return numbers, strings, bytes, tensors or arrays, and tuples, lists and dicts "
                "of them",
            ) from error
    named = {
        name: (
            stream.base,
            stream.coordinates,
            {k: stream.states[g.device] for k, g in keys.items() if g.device in stream.states},
        )
        for name, stream in switch.now.streams.items()
        if name != DEFAULT
    }
    return {
        "default": {key: g.get_state() for key, g in keys.items()},
        "named": named,
        "registered": registered,
    }


def _keys() -> dict[str, Generator]:
    """Generators by device; without the index where a rank has one device: another launch may number them otherwise."""
    found = generators()
    types = [g.device.type for g in found]
    return {g.device.type if types.count(g.device.type) == 1 else str(g.device): g for g in found}


def _registered() -> list[Any]:
    return [s for s in engine_streams.registered() if s is not switch]


def load_state_dict(state: dict[str, Any], strict: bool = True) -> None:
    """Put this global rank's states back. No communication; loads everything or, after an error, nothing.

    Args:
        state: what :func:`together` gave, on any rank.
        strict: refuse a state of another number of ranks, of other streams or of another place in the mesh. With
            False a named stream continues where the saved stream with its name, seed and coordinates stood, whatever
            rank that was, and one without a counterpart begins at its seed; the default generators and the
            registered streams of a rank that the saved job did not have stay as they are.

    Raises:
        WrongState: it does not fit, and why (DC455).
        StreamInUse: inside a block of a stream (DC451).
    """
    switch.refuse_inside("loaded")
    everyone = _open(state)
    rank, world = group_rank(), group_size()
    if strict and len(everyone) != world:
        raise WrongState(
            f"the random states are of {len(everyone)} ranks, and this job has {world}",
            why="each rank has streams of its own; there is no exact continuation on another number of ranks",
            fix="load with strict=False: streams continue by mesh coordinate, new ones begin at their seed",
        )
    mine = everyone[rank] if rank < len(everyone) else None
    named = _named(everyone, mine, strict)
    writes: list[tuple[Any, Any]] = []
    if mine is not None:
        keys = _keys()
        _same_keys("default generators", mine["default"], keys, strict, rank)
        writes += [(keys[key], value) for key, value in mine["default"].items() if key in keys]
        sources = {s.name: s for s in _registered()}
        _same_keys("registered random streams", mine["registered"], sources, strict, rank)
        writes += [(sources[key], value) for key, value in mine["registered"].items() if key in sources]
    before = [(target, target.get_state()) for target, _ in writes]
    try:
        for target, value in writes:
            target.set_state(value)
    except BaseException:
        for target, value in before:
            target.set_state(value)
        raise
    if named:
        switch.put(named)


def _open(state: Any) -> list[Any]:
    """Every rank's entry, read as data."""
    try:
        version, world, states = state["version"], state["world"], state["states"]
    except (TypeError, LookupError) as error:
        raise _not_ours(repr(error)) from error
    if version != _VERSION:
        old = version == 1
        raise WrongState(
            f"the random states have version {version}, and this distckpt reads version {_VERSION}",
            why="version 1 is a pickle, and to read one is to run what is in it" if old else None,
            fix="load them with the distckpt that saved them"
            + (", and save them as plain data: only from a source that you trust" if old else ""),
        )
    try:
        everyone = [plain_data.loads(one) for one in plain_data.loads(states)]
        if world != len(everyone) or not all(map(_is_entry, everyone)):
            raise NotPlain("it is the plain data of something else")
    except (NotPlain, TypeError) as error:
        raise _not_ours(str(error)) from error
    return everyone


def _not_ours(why: str) -> WrongState:
    return WrongState(
        "this is not what coord.state_dict() returns",
        why=why,
        fix="pass the value that was saved, not a part of it",
    )


def _is_entry(found: Any) -> bool:
    """Whether the plain data of one rank has the form that :func:`_mine` gives it."""
    try:
        parts: list[dict[Any, Any]] = [found[name] for name in ("default", "named", "registered")]
        named = all(
            (type(base), type(states)) == (int, dict)
            and all((type(dim), type(i)) == (str, int) for dim, i in coordinates)
            for base, coordinates, states in found["named"].values()
        )
        return named and all(type(p) is dict and all(type(key) is str for key in p) for p in parts)
    except (TypeError, ValueError, LookupError, AttributeError):
        return False


def _named(everyone: list[Any], mine: Any, strict: bool) -> dict[str, Stream]:
    now = {name: s for name, s in switch.now.streams.items() if name != DEFAULT}
    if strict:
        assert mine is not None  # as many ranks as then
        _same_keys("named streams", mine["named"], now, True, group_rank())
    keys = _keys()
    found: dict[str, Stream] = {}
    for name, stream in now.items():
        who = (stream.base, stream.coordinates)
        candidates = [] if mine is None else [mine]
        if strict and mine is not None and mine["named"][name][:2] != who:
            base, at, _ = mine["named"][name]
            raise WrongState(
                f"stream {name!r} of rank {group_rank()} was saved with seed {base} at {dict(at)}, and has "
                f"seed {stream.base} at {dict(stream.coordinates)} now",
                why="the ranks stand at other places of the mesh than when the states were saved",
                fix="make the mesh as it was, or load with strict=False, which goes by coordinates",
            )
        if not strict:
            candidates += everyone
        states = next((c["named"][name][2] for c in candidates if c["named"].get(name, ())[:2] == who), None)
        fresh: dict[Any, Any] = {}
        if states is not None:
            _same_keys(f"devices of stream {name!r}", states, keys, strict, group_rank(), more=True)
            fresh = {keys[key].device: value for key, value in states.items() if key in keys}
        found[name] = dataclasses.replace(stream, states=fresh)
    return found


def _same_keys(what: str, saved: Any, now: Any, strict: bool, rank: int, more: bool = False) -> None:
    missing, added = sorted(saved.keys() - now.keys()), sorted(now.keys() - saved.keys())
    if strict and (missing or (added and not more)):
        raise WrongState(
            f"the {what} of rank {rank} are not those that were saved",
            why="; ".join(
                text
                for text in (
                    f"saved and not here: {', '.join(missing)}" if missing else "",
                    f"here and not saved: {', '.join(added)}" if added and not more else "",
                )
                if text
            ),
            fix="use the same devices once, seed and register the same streams, then load; or strict=False",
        )
