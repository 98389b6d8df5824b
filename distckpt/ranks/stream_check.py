"""The self-test of named streams over ranks: do they draw the same, and differ, as their names promise?"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, NamedTuple

import torch

from distckpt.errors import StreamsDisagree
from distckpt.ranks.store import gather
from distckpt.ranks.switch import DEFAULT, Stream, generators, switch

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
    switch.refuse_inside("checked")
    return {
        name: (stream.base, stream.coordinates, _draws(stream))
        for name, stream in sorted(switch.now.streams.items())
        if name != DEFAULT
    }


def compare(everyone: list[dict[str, Any]]) -> list[Checked]:
    """Hold what every rank has :func:`drawn` against what the names promise.

    Raises:
        StreamsDisagree: naming ranks (DC453).
    """
    return [_check(name, everyone) for name in _names(everyone)]


def _draws(stream: Stream) -> dict[str, str]:
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
