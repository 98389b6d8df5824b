"""Judge many drawn programs from one seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from . import program as p
from .adapt import for_torch
from .draw import programs
from .engines import Engine
from .judge import judge


@dataclass
class Tally:
    """What a sweep saw: verdicts by kind, the reasons behind them, and the features covered."""

    counting: bool = True
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)

    def add(self, program: p.Program, engine: Engine) -> None:
        """Judge one program and count it; from the first disagreement on nothing is counted."""
        try:
            verdict = judge(program, engine)
        except Exception:
            self.counting = False
            raise
        if not self.counting:
            return  # hypothesis is shrinking
        self.verdicts[verdict.kind] += 1
        if verdict.why:
            self.reasons[f"{verdict.kind}: {verdict.why}"] += 1
        if verdict.kind in ("equal", "refused"):
            self.features.update(p.features(program if engine.ours else for_torch(program)))


def sweep(engine: Engine, count: int, start: int, tally: Tally) -> None:
    """Judge ``count`` programs drawn from the seed ``start``; the first disagreement is shrunk and raised."""
    tally.counting = True

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @seed(start)
    @given(programs())
    def one(program: p.Program) -> None:
        tally.add(program, engine)

    one()
