"""The random states of all ranks: one value to save and load, written as plain data, and a self-test over ranks.

Note [One value for all ranks]
    ``torch.distributed.checkpoint`` takes equal keys of different ranks for copies and keeps one of them, so states
    of ranks under one key would all become one rank's. A key per rank avoids that, but a job on another number of
    ranks then fails on a missing key before anybody can say why. So every rank gathers the states of all and gives
    the same value: whichever copy is kept, it holds every rank's. It is about 5 KB per rank, stream and device type
    on which something was drawn (16 bytes on CUDA), and a few hundred bytes for a stream that nobody drew from.

Note [A checkpoint is data]
    What is saved is plain data, not a pickle: whoever can write a checkpoint could otherwise run
    code in the job that loads it. Version 1 was a pickle, and is not read.

Note [The format]
    One line of JSON, and after it the contents of tensors, arrays and bytes, one after another. In the JSON a number,
    a string, a bool or None stands for itself; everything else is a list that begins with its kind:

    ``["list", item...]``, ``["tuple", item...]``, ``["dict", [key, value]...]``, ``["bytes", size]``,
    ``["tensor", size, dtype, shape, device]``, ``["array", size, dtype, shape]``

    Contents are met in the order in which they lie there, so sizes are enough to find them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from distckpt.engine import streams as engine_streams
from distckpt.engine.rng import Generator
from distckpt.errors import StreamsDisagree, UnsavableStream, WrongState
from distckpt.ranks.rng_streams import DEFAULT, NamedStream, generators, tracker
from distckpt.ranks.store import gather
from distckpt.ranks.world import group_rank, group_size

_ITSELF = (type(None), bool, int, float, str)
_ARRAY_TYPE = re.compile(r"[<>|][biufc]\d+")  # how numpy spells bools, integers, floats and complex numbers


class NotPlain(ValueError):
    """A value that is no plain data, or bytes that hold none."""


def dumps(value: Any) -> bytes:
    """``value`` as bytes: None, bools, numbers, strings, bytes, tensors, numpy arrays; lists, tuples, dicts of them.

    Raises:
        NotPlain: anything else, a subclass of one of these included.
    """
    contents: list[bytes] = []
    try:
        head = json.dumps(_encode(value, contents), separators=(",", ":"))
    except (RecursionError, ValueError) as error:  # ValueError: an int of more digits than Python prints
        raise error if isinstance(error, NotPlain) else NotPlain(str(error)) from error
    return b"".join([head.encode(), b"\n", *contents])


def _encode(value: Any, contents: list[bytes]) -> Any:
    kind = type(value)
    if kind in _ITSELF:
        return value
    if kind in (list, tuple):
        return [kind.__name__, *(_encode(item, contents) for item in value)]
    if kind is dict:
        return ["dict", *([_encode(k, contents), _encode(v, contents)] for k, v in value.items())]
    if kind is bytes:
        contents.append(value)
        return ["bytes", len(value)]
    if kind is torch.Tensor and value.layout is torch.strided and value.device.type != "meta":
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        contents.append(bytes(flat.view(torch.uint8).tolist()))
        name = str(value.dtype).removeprefix("torch.")
        return ["tensor", len(contents[-1]), name, list(value.shape), str(value.device)]
    # numpy without importing it; a scalar of numpy's is an array without dimensions
    if kind.__module__ == "numpy" and _ARRAY_TYPE.fullmatch(
        getattr(getattr(value, "dtype", None), "str", "")
    ):
        contents.append(value.tobytes())
        return ["array", len(contents[-1]), value.dtype.str, list(value.shape)]
    raise NotPlain(f"{kind.__module__}.{kind.__qualname__} is no plain data")


def loads(data: bytes) -> Any:
    """The value of :func:`dumps`.

    Raises:
        NotPlain: ``data`` is not what :func:`dumps` returned.
    """
    try:
        head, _, contents = data.partition(b"\n")
        reader = _Reader(contents)
        value = reader.decode(json.loads(head))
        if reader.at != len(contents):
            raise NotPlain("it is longer than it says")
        return value
    except NotPlain:
        raise
    except Exception as error:  # whatever is wrong with bytes from outside
        raise NotPlain(f"{type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.at = 0

    def decode(self, said: Any) -> Any:
        if type(said) in _ITSELF:
            return said
        kind, *rest = said
        if kind == "list":
            return [self.decode(item) for item in rest]
        if kind == "tuple":
            return tuple([self.decode(item) for item in rest])
        if kind == "dict":
            return dict(self._pairs(rest))
        if kind == "bytes":
            (size,) = rest
            return self._take(size)
        if kind == "tensor":
            size, name, shape, device = rest
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise NotPlain(f"there is no dtype {name!r}")
            return self._tensor(size).view(dtype).reshape(shape).to(device)
        if kind == "array":
            size, name, shape = rest
            if not _ARRAY_TYPE.fullmatch(name):
                raise NotPlain(f"there is no array of {name!r}")
            made = self._tensor(size).numpy().view(name).reshape(shape)
            return made if shape else made[()]
        raise NotPlain(f"there is no kind {kind!r}")

    def _pairs(self, pairs: Any) -> Iterator[tuple[Any, Any]]:
        for key, value in pairs:
            yield self.decode(key), self.decode(value)

    def _take(self, size: Any) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self.contents) - self.at:
            raise NotPlain("it is cut off")
        self.at += size
        return self.contents[self.at - size : self.at]

    def _tensor(self, size: Any) -> torch.Tensor:
        found = bytearray(self._take(size))
        return torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)


_VERSION = 2


def own_state() -> bytes:
    """The states of every random stream of this rank, as plain data.

    Raises:
        UnsavableStream: the state of a source is no plain data (DC454).
        StreamInUse: inside a block of a stream (DC451).
    """
    tracker.refuse_inside("saved")
    return dumps(_mine())


def together(mine: bytes) -> dict[str, Any]:
    """What every rank has as its :func:`own_state`, as one value. A collective: every rank calls it.

    Returns:
        ``{"version": int, "world": int, "states": bytes}``, equal on all ranks; ``states`` is plain data, one
        entry per global rank: its default generators, named streams and registered generators and sources.
    """
    everyone = gather(mine)
    return {"version": _VERSION, "world": len(everyone), "states": dumps(everyone)}


def _mine() -> dict[str, Any]:
    keys = _keys()
    registered: dict[str, Any] = {}
    for source in _registered():
        registered[source.name] = source.get_state()
        try:
            dumps(registered[source.name])
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
        for name, stream in tracker.now.streams.items()
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
    return [s for s in engine_streams.registered() if s is not tracker]


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
    tracker.refuse_inside("loaded")
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
        tracker.put(named)


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
        everyone = [loads(one) for one in loads(states)]
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


def _named(everyone: list[Any], mine: Any, strict: bool) -> dict[str, NamedStream]:
    now = {name: s for name, s in tracker.now.streams.items() if name != DEFAULT}
    if strict:
        assert mine is not None  # as many ranks as then
        _same_keys("named streams", mine["named"], now, True, group_rank())
    keys = _keys()
    found: dict[str, NamedStream] = {}
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


_DRAWS = 64


class Checked(NamedTuple):
    """One stream: its dims, and the groups of ranks that draw the same from it."""

    name: str
    dims: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]


def check_streams() -> list[Checked]:
    """Draw from a copy of every stream on every rank and compare. No stream moves. A collective.

    Returns:
        One row per stream: ``groups`` are the ranks that draw the same, as the name promises.

    Raises:
        StreamsDisagree: on every rank, naming ranks (DC453).
        StreamInUse: inside a block (DC451).
    """
    return compare(gather(drawn()))


def drawn() -> dict[str, Any]:
    """What this rank draws next from each stream, as a digest; no stream moves.

    Raises:
        StreamInUse: inside a block (DC451).
    """
    tracker.refuse_inside("checked")
    return {
        name: (stream.base, stream.coordinates, _draws(stream))
        for name, stream in sorted(tracker.now.streams.items())
        if name != DEFAULT
    }


def compare(everyone: list[dict[str, Any]]) -> list[Checked]:
    """Hold what every rank has :func:`drawn` against what the names promise.

    Raises:
        StreamsDisagree: naming ranks (DC453).
    """
    return [_check(name, everyone) for name in _names(everyone)]


def _draws(stream: NamedStream) -> dict[str, str]:
    found: dict[str, str] = {}
    for g in generators():
        held = g.get_state()
        try:
            g.set_state(stream.state(g))
            drawn = torch.rand(_DRAWS, device=g.device).cpu()
        finally:
            g.set_state(held)
        digest = hashlib.sha256(bytes(drawn.view(torch.uint8).tolist())).hexdigest()
        found.setdefault(g.device.type, digest)  # of several devices of a type the first speaks
    return found


def _names(everyone: list[dict[str, Any]]) -> list[str]:
    for rank, theirs in enumerate(everyone):
        if theirs.keys() != everyone[0].keys():
            raise StreamsDisagree(
                f"rank {rank} has other random streams than rank 0: {_list(theirs)}, not {_list(everyone[0])}",
                fix="call seed_streams with the same table on every rank",
            )
    return list(everyone[0])


def _check(name: str, everyone: list[dict[str, Any]]) -> Checked:
    bases, places, draws = zip(*(theirs[name] for theirs in everyone), strict=True)
    for what, values in (("seed", bases), ("mesh dims", [tuple(d for d, _ in p) for p in places])):
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise StreamsDisagree(
                f"stream {name!r} was seeded with another {what} on rank {other} ({values[other]}) "
                f"than on rank 0 ({values[0]})",
                fix="call seed_streams with the same seed, mesh and table on every rank",
            )
    groups: dict[Any, list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        groups[place].append(rank)
    for kind in sorted(set().union(*draws)):
        seen: dict[str, int] = {}
        for ranks in groups.values():
            first = draws[ranks[0]].get(kind)
            apart = [r for r in ranks if draws[r].get(kind) != first]
            if apart:
                raise StreamsDisagree(
                    f"stream {name!r} draws other numbers on rank {_ranks(apart)} than on rank {ranks[0]} ({kind})",
                    why=f"they stand at the same {_place(places[ranks[0]])}, so the name promises the same numbers; "
                    "one of them has drawn more often, or has no such device",
                    fix="enter the stream on all of these ranks, for draws of the same shapes",
                )
            if first is not None and first in seen:
                raise StreamsDisagree(
                    f"stream {name!r} draws the same numbers on rank {seen[first]} and on rank {ranks[0]} ({kind})",
                    why=f"they stand at {_place(places[seen[first]])} and {_place(places[ranks[0]])}, "
                    "so the name promises different ones",
                    fix="do not reseed (torch.manual_seed) inside a block; otherwise choose another seed",
                )
            if first is not None:
                seen[first] = ranks[0]
    return Checked(name, tuple(d for d, _ in places[0]), tuple(map(tuple, groups.values())))


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _place(coordinates: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{dim}={i}" for dim, i in coordinates) or "the one place there is"
