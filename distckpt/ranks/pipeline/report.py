"""Report: what happened on one stage in the last step."""

from __future__ import annotations

import dataclasses
from collections import Counter

Key = tuple[int, str]  # micro-batch, region


@dataclasses.dataclass
class StageReport:
    """Counts of one stage, of the step that runs or ran last. A region is named by its place in the stage.

    Attributes:
        stage: index of the stage.
        replays: of each (micro-batch, region), early ones included.
        early: those of ``replays`` that were made before the gradient arrived.
        kept: (micro-batch, region) that was a plain call, since its backward came next.
        ahead_bytes: most bytes that early replays held when a gradient was waited for.
        weight_bytes: most bytes that were kept between the input half and the weight half of a split backward.
        weights_early: weight halves that were run before their turn, so that no values pile up for them.
        lazy: reasons why a replay waited for its gradient, with how often.
    """

    stage: int
    replays: Counter[Key] = dataclasses.field(default_factory=Counter)
    early: Counter[Key] = dataclasses.field(default_factory=Counter)
    kept: Counter[Key] = dataclasses.field(default_factory=Counter)
    ahead_bytes: int = 0
    weight_bytes: int = 0
    weights_early: int = 0
    lazy: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"stage {self.stage}: {self.replays.total()} replays, {self.early.total()} of them early, "
            f"{self.kept.total()} regions kept; {self.ahead_bytes} bytes ahead, {self.weight_bytes} for weights"
        ]
        if self.weights_early:
            lines.append(
                f"  {self.weights_early} weight halves run before their turn, so that no values pile up"
            )
        lines += [f"  not early ({times}x): {reason}" for reason, times in self.lazy.items()]
        return "\n".join(lines)
