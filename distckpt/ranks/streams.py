"""Streams: named random streams, seeded by this rank's place in the mesh.

Note [What a name promises]
    A stream differs between two ranks exactly when they stand at different coordinates along one of its mesh dims:

    ================== ======================== ================ ===========================================
    stream             differs over             equal over       for values that are
    ================== ======================== ================ ===========================================
    data-parallel      dp, pp                   tp, cp, ep       whole on every rank of a tensor-parallel group
    context-parallel   cp, dp, pp               tp, ep           split along the sequence, whole over tp
    tensor-parallel    tp, cp, dp, pp           ep               split over tp
    expert-parallel    ep, tp, cp, dp, pp                        inside experts
    ================== ======================== ================ ===========================================

    The seed is the first eight bytes of SHA-256 over (seed, name, coordinates): no sums of offsets that meet again
    at another coordinate. The CPU's generator uses the lower half of a seed only; ``check_streams`` finds the rare
    pair of ranks that meets there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from distckpt import _torch_dist
from distckpt._torch import call_without_dynamo, dynamo_callback, opaque_to_dynamo
from distckpt.engine import streams as engine_streams
from distckpt.errors import BadStreams
from distckpt.ranks.switch import DEFAULT, Frame, Stream, switch
from distckpt.ranks.world import group_rank, group_size

STREAMS: dict[str, tuple[str, ...]] = {
    "data-parallel": ("dp", "pp"),
    "context-parallel": ("cp", "dp", "pp"),
    "tensor-parallel": ("tp", "cp", "dp", "pp"),
    "expert-parallel": ("ep", "tp", "cp", "dp", "pp"),
}
"""The streams that exist by default, and the dims over which each differs."""

ALIASES: dict[str, str] = {
    **dict.fromkeys(("data", "ddp", "fsdp", "dp_replicate", "dp_shard", "replicate", "shard"), "dp"),
    **dict.fromkeys(("tensor", "model", "mp", "etp"), "tp"),
    **dict.fromkeys(("pipe", "pipeline", "stage"), "pp"),
    **dict.fromkeys(("expert", "experts"), "ep"),
    **dict.fromkeys(("context", "seq", "sp"), "cp"),
}
"""Other names of mesh dims; several dims may have one meaning."""


class stream(contextlib.AbstractContextManager[None]):
    """Draw from the named stream inside the block: ``with dc.rng.stream("tensor-parallel"): ...``.

    The default generators of the CPU and of every live device stand where the stream stands, and are back where they
    were afterwards, also after an exception. Blocks nest. A region that is recorded in a block or enters one
    replays with the states of its forward and leaves every stream where it was.

    Raises:
        UnknownStream: on entering; nobody seeded a stream of that name (DC450).
        StreamInUse: on entering, while another thread is inside a block; on leaving, when the block is not the
            innermost one or a device was initialised inside it (DC451).
    """

    __slots__ = ("_frames", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._frames: list[Frame] = []

    @opaque_to_dynamo
    def __enter__(self) -> None:
        self._frames.append(_eagerly(switch.enter, self.name))

    @opaque_to_dynamo
    def __exit__(self, *exc: object) -> None:
        _eagerly(switch.leave, self._frames.pop())


def _eagerly(function: Any, argument: Any) -> Any:
    # Under torch.compile a block breaks the graph; what it does to generators is not for Dynamo to trace.
    eager = dynamo_callback() is None
    return function(argument) if eager else call_without_dynamo(function, argument)


class Seeded(contextlib.AbstractContextManager["Seeded"]):
    """Handle of seeded streams: ``names``, and ``remove()`` to forget them; also a context manager."""

    def __init__(self, new: Mapping[str, Stream]) -> None:
        self.names = tuple(new)

    def remove(self) -> None:
        """Forget the streams. Regions recorded before keep what they stashed. Removing twice is harmless.

        Raises:
            StreamInUse: inside a block (DC451).
        """
        switch.drop(dict.fromkeys(self.names))
        if not switch.names():
            _forget_tracker()

    def __exit__(self, *exc: object) -> None:
        self.remove()


def derive(seed: int, name: str, coordinates: Iterable[tuple[str, int]]) -> int:
    """The seed of a stream at a place: an unsigned 63-bit int."""
    text = json.dumps([seed, name, sorted(coordinates)], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_streams(
    mesh: Any,
    seed: int,
    *,
    streams: Mapping[str, Iterable[str]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Seeded:
    """Seed the named streams of this rank by its coordinates in ``mesh``. No communication.

    Call it once the devices are in use. A second call adds streams (an expert mesh, for example), and starts those of
    the same name anew. Where DTensor has a tracker of random states for the device type of the mesh, it is made here:
    left to itself it would overwrite the streams with rank 0's states in its first random operator.

    Args:
        mesh: a ``DeviceMesh`` with named dims; None in a job of one process.
        seed: any int; the same on every rank.
        streams: name of each stream to the dims over which it differs; None takes :data:`STREAMS`.
        aliases: further names of mesh dims, over :data:`ALIASES`: ``{"my_dim": "dp"}``.

    Returns:
        A handle with ``remove()``.

    Raises:
        BadStreams: no mesh for several ranks, a mesh without names or without this rank, a dim whose meaning is
            unknown, a seed that is not an int (DC452). Nothing was seeded.
        StreamInUse: inside a block (DC451).
    """
    if type(seed) is not int:
        raise BadStreams(f"the seed of random streams is an int, not a {type(seed).__name__}")
    table = _table(streams)
    if aliases is not None and not (isinstance(aliases, Mapping) and _names(aliases, aliases.values())):
        raise BadStreams(
            "aliases= is a table of mesh dims and what they mean", fix='for example aliases={"my_dim": "dp"}'
        )
    meanings = {**ALIASES, **(aliases or {})}
    place = _coordinates(mesh, meanings, {dim for dims in table.values() for dim in dims})
    new: dict[str, Stream] = {}
    for name, dims in table.items():
        differs = {meanings.get(dim, dim) for dim in dims}
        at = tuple(sorted((dim, i) for dim, meaning, i in place if meaning in differs or dim in dims))
        new[name] = Stream(name, derive(seed, name, at), seed, at)
    switch.refuse_inside("seeded")
    if mesh is not None:
        _stash_tracker(mesh)
    switch.put(new)
    return Seeded(new)


def _table(streams: Any) -> dict[str, tuple[str, ...]]:
    if streams is None:
        return dict(STREAMS)
    known = isinstance(streams, Mapping) and DEFAULT not in streams and _names(streams)
    lists = known and all(
        isinstance(dims, Iterable) and not isinstance(dims, str) for dims in streams.values()
    )
    table = {name: tuple(dims) for name, dims in streams.items()} if lists else {}
    if not lists or not _names(*table.values()):
        raise BadStreams(
            f"streams= is a table of names (not {DEFAULT!r}) and tuples of mesh dims",
            fix='for example streams={"router": ("dp", "ep")}',
        )
    return table


def _names(*given: Iterable[Any]) -> bool:
    return all(isinstance(name, str) for names in given for name in names)


def _coordinates(mesh: Any, meanings: Mapping[str, str], wanted: set[str]) -> list[tuple[str, str, int]]:
    """Name, meaning and this rank's coordinate of every dim of the mesh."""
    if mesh is None:
        if group_size() > 1:
            raise BadStreams(
                f"random streams need a mesh: this job has {group_size()} ranks",
                why="without coordinates every rank would get the same streams",
                fix='mesh = init_device_mesh(device_type, (dp, tp), mesh_dim_names=("dp", "tp"))',
            )
        return []
    names = getattr(mesh, "mesh_dim_names", None)
    if names is None:
        raise BadStreams(
            f"random streams need a DeviceMesh whose dims have names, not {mesh!r}",
            why="the names say over which dims a stream differs",
            fix='pass mesh_dim_names=("dp", "tp"), for example, when you make the mesh',
        )
    at = mesh.get_coordinate()
    if at is None:
        raise BadStreams(
            f"rank {group_rank()} is not in the mesh", fix="seed its streams with a mesh that it is in"
        )
    known = set(ALIASES.values()) | wanted
    strange = [name for name in names if meanings.get(name, name) not in known and name not in known]
    if strange:
        raise BadStreams(
            f"mesh dim {', '.join(map(repr, strange))} has no meaning for random streams",
            why=f"known: {', '.join(sorted(known))}, and the names in distckpt.ranks.streams.ALIASES",
            fix=f'say what it is: aliases={{{strange[0]!r}: "dp"}}, or name it in streams=',
        )
    return [(name, meanings.get(name, name), int(i)) for name, i in zip(names, at, strict=True)]


_tracker: engine_streams.Registration | None = None


def _stash_tracker(mesh: Any) -> None:
    global _tracker
    if _torch_dist.make_dtensor_tracker(mesh) is not None and _tracker is None:
        _tracker = engine_streams.add(
            engine_streams.Stream(
                "DTensor tracker",
                lambda: _torch_dist.tracker_state(_torch_dist.dtensor_tracker()),
                lambda state: _torch_dist.set_tracker_state(_torch_dist.dtensor_tracker(), state),
            )
        )


def _forget_tracker() -> None:
    global _tracker
    if _tracker is not None:
        _tracker.remove()
        _tracker = None
