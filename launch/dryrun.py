"""Look at a job of any size on one machine: what every kind of rank would build, save and hold.

    python launch/dryrun.py --ranks 512 --parallel pp+fsdp --layers 32 --width 4096 --heads 32
    launch/train.sh --dry-run --ranks 512 --parallel fsdp

Nothing is computed: tensors are fake, and so is the process group. Exit code: 0, or 2 for input it cannot use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    _root = Path(__file__).resolve().parents[1]
    sys.path[0:1] = [str(_root), str(_root / "backends")]

if TYPE_CHECKING:
    from launch.drykinds import Kind, Layout

OK, BAD_INPUT = 0, 2


@dataclass(frozen=True)
class DryRun:
    """Look at a job of any size: what every kind of rank would build, save and hold."""

    ranks: int = 8
    """Ranks of the job."""
    parallel: str = "fsdp"
    """fsdp, ddp, pp, tp or pp+fsdp."""
    stages: int = 0
    """Pipeline stages; 0: one per rank for pp, as many as fit for pp+fsdp."""
    micro_batches: int = 8
    """Micro-batches of a step, with a pipeline."""
    layers: int = 6
    """Transformer blocks; each is one region."""
    width: int = 128
    """Channels of the residual stream."""
    heads: int = 4
    """Attention heads."""
    context: int = 128
    """Bytes per sequence."""
    batch: int = 8
    """Sequences per rank and micro-batch."""
    dropout: float = 0.1
    """Dropout probability."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    if find_spec("torch") is None:
        print("launch/dryrun.py: [DC500] torch is not installed: pip install -e '.[cli]'", file=sys.stderr)
        return BAD_INPUT
    from launch.errors import LaunchError

    try:
        try:
            import tyro
        except ModuleNotFoundError as missing:
            raise LaunchError(f"{missing.name} is not installed", fix="pip install -e '.[cli]'") from missing
        layout = _layout(tyro.cli(DryRun, args=arguments, prog="launch/dryrun.py"))
        from launch.drykinds import kinds

        for line in table(layout, kinds(layout)):
            print(line)
    except LaunchError as error:
        print(f"launch/dryrun.py: {error.line()}", file=sys.stderr, flush=True)
        return BAD_INPUT
    return OK


def _layout(options: DryRun) -> Layout:
    from launch.drykinds import Layout
    from launch.errors import BadOption

    given = dict(vars(options))
    piped = "pp" in options.parallel
    if options.stages and not piped:
        raise BadOption(
            f"--stages means nothing to --parallel {options.parallel}", fix="leave it out, or use pp+fsdp"
        )
    if options.stages < 0:
        raise BadOption(f"--stages is {options.stages}", fix="give 1 or more, or 0 to have them chosen")
    if options.parallel == "pp" and options.stages not in (0, options.ranks):
        raise BadOption(
            f"--stages {options.stages} leaves ranks of --parallel pp without work",
            fix=f"leave it out, or use --parallel pp+fsdp with --stages {options.stages}",
        )
    if not piped:
        given |= {"stages": 1, "micro_batches": 1}
    elif not options.stages:
        fits = [n for n in range(1, options.layers + 1) if options.ranks % n == 0]
        given["stages"] = options.ranks if options.parallel == "pp" else max(fits, default=1)
    return Layout(**given)


def ranks(count: int) -> str:
    """How many ranks, in words: 1 rank, 2 ranks."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def table(layout: Layout, kinds: Iterable[Kind]) -> list[str]:
    """What to print; at most 88 columns."""
    what = f"{ranks(layout.ranks)}, {layout.parallel}"
    if layout.stages > 1:
        what += f": {layout.stages} stages of {ranks(layout.shards)}, 1F1B with {layout.micro_batches} micro-batches"
    found = [
        what,
        f"{layout.layers} blocks of {layout.width}, {layout.batch} x {layout.context} bytes a rank, dropout "
        f"{layout.dropout:g}, fp32",
        "Fake tensors, nothing is computed. MB of one rank:",
        "",
        f"{'holds':>52}{'a micro-batch saves':>28}",
        f"{'ranks':>12}{'stage':>6}{'units':>6}{'regions':>8}{'params':>10}{'+g, adam':>10}"
        f"{'with':>9}{'without':>9}{'in flight':>10}{'peak':>8}",
    ]
    for kind in kinds:
        found.append(
            f"{_spans(kind.ranks):>12}{kind.stage:>6}{kind.units:>6}{kind.regions:>8}"
            f"{_mb(kind.parameters):>10}{_mb(4 * kind.parameters):>10}"
            f"{_mb(kind.saved):>9}{_mb(kind.unsaved):>9}{kind.in_flight:>10}{_mb(kind.peak):>8}"
        )
    return found


def _spans(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return texts[0] if len(texts) == 1 else f"{texts[0]}, ..."


def _mb(count: int) -> str:
    return f"{count / 1e6:.3f}" if count < 10e6 else f"{count / 1e6:.1f}"


if __name__ == "__main__":
    sys.exit(main())
