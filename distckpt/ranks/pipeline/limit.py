"""Limit: how much may be recomputed before its gradient is there.

Note [What costs no peak]
    Any engine has the values of one region at a time in memory, of the newest first: what makes a stage's output is the
    first thing that its backward needs. So these values may exist while the gradient is on its way, and nothing else
    may: an older region would add its values to theirs, what the stage computes after its last region is still
    saved then, and a region that is kept on the last stage would add its values to whatever the loss needs.
"""

from __future__ import annotations

import enum
import re

from distckpt.errors import BadAhead

_UNITS = {"B": 1} | {
    f"{letter}{kind}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for kind, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*")
ONE = "1 micro-batch"


class Ahead(enum.Enum):
    """A limit that is no number of bytes."""

    NEWEST = "the newest region"
    ALL = ONE


def limit_of(early_replay: bool, ahead: int | str | None) -> int | Ahead:
    """What may be held ahead; 0 for nothing.

    Raises:
        BadAhead: not an amount, more than one micro-batch, or given although early replay is off.
    """
    if not early_replay:
        if ahead is not None:
            raise BadAhead(
                f"ahead={ahead!r} was given with early_replay=False",
                why="nothing is held ahead of its gradient when no replay is early",
                fix="leave one of the two out",
            )
        return 0
    if ahead is None:
        return Ahead.NEWEST
    if ahead == ONE:
        return Ahead.ALL
    if isinstance(ahead, int) and not isinstance(ahead, bool) and ahead > 0:
        return ahead
    size = _SIZE.fullmatch(ahead) if isinstance(ahead, str) else None
    amount = int(float(size[1]) * _UNITS[size[2]]) if size is not None and size[2] in _UNITS else 0
    if amount <= 0:
        raise BadAhead(
            f"ahead={ahead!r} is no amount that can be held ahead",
            why="a replay is only made early for the backward that comes next, which is of one micro-batch",
            fix=f'give bytes (2**30), a size ("1.5 GiB", "800 MB"), or {ONE!r}; leave it out for what '
            "costs no memory; early_replay=False holds nothing ahead",
        )
    return amount
