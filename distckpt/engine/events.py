"""Counts of what the engine did, for tests, reports and people."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals of this process since its start. Read them before and after, and subtract.

    ``regions`` counts records, ``replays`` counts recomputations (an early-stopped one counts as one).
    Plain integers without a lock: two device threads may lose a count, so they report, never decide.
    """

    regions: int = 0
    replays: int = 0


counters = Counters()
