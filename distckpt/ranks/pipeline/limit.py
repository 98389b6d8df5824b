"""Limit: how many bytes of region values may exist before their gradient does."""

from __future__ import annotations

import re

from distckpt.ranks.pipeline.errors import BadAhead

_UNITS = {"B": 1} | {
    f"{letter}{kind}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for kind, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*")
ONE = "1 micro-batch"


def bytes_ahead(early_replay: bool, ahead: int | str | None) -> int | None:
    """Bytes that may be held ahead; None for as much as one micro-batch needs.

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
    if ahead is None or ahead == ONE:
        return None
    if isinstance(ahead, int) and not isinstance(ahead, bool) and ahead > 0:
        return ahead
    size = _SIZE.fullmatch(ahead) if isinstance(ahead, str) else None
    amount = int(float(size[1]) * _UNITS[size[2]]) if size is not None and size[2] in _UNITS else 0
    if amount <= 0:
        raise BadAhead(
            f"ahead={ahead!r} is no amount that can be held ahead",
            why="a replay is only made early for the backward that comes next, which is of one micro-batch",
            fix=f'give bytes (2**30), a size ("1.5 GiB", "800 MB"), or {ONE!r}, the default; '
            "early_replay=False holds nothing ahead",
        )
    return amount
