"""``distckpt run``: an unmodified script, with torch.utils.checkpoint's names resolved to ours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distckpt.cli.arguments import Options
from distckpt.cli.script import hide_our_frames, module, script
from distckpt.errors import BadUsage

SCHEMA = "distckpt.run/1"


@dataclass(frozen=True)
class Prepared:
    """A script that is there, and what to do around it."""

    start: Callable[[], None]
    name: str
    quiet: bool
    report: Path | None

    def run(self) -> int:
        """Run it and say what its regions did; what it raises passes through, ``SystemExit`` among it."""
        from distckpt import compat
        from distckpt.cli.tally import Tally

        rank = int(os.environ.get("RANK", "0") or 0)
        size = int(os.environ.get("WORLD_SIZE", "1") or 1)
        installed = (
            compat.install()
        )  # for good: threads and exit handlers of the script outlive its last line
        replaced = installed.replaced()
        self._say(rank, _replaced_text(replaced))
        tally = Tally()
        try:
            self.start()
        except BaseException:
            sys.excepthook = hide_our_frames(sys.excepthook)
            raise
        finally:
            taken = installed.lost()
            counts = asdict(tally.stop())
            for line in _summary(counts, taken, rank, size):
                self._say(rank, line)
            if self.report is not None:
                found = {"schema": SCHEMA, "script": self.name, "rank": rank, "ranks": size, **counts}
                _write(self.report, rank, size, {**found, "replaced": list(replaced), "lost": list(taken)})
        return 0

    def _say(self, rank: int, line: str) -> None:
        if not self.quiet and rank == 0:
            print(f"distckpt run: {line}", file=sys.stderr, flush=True)


def prepare(options: Options) -> Prepared:
    """Find the script before anything heavy is imported.

    Raises:
        NoScript: there is none (DC702).
        BadUsage: ``--json`` cannot be written where it says (DC701).
    """
    name = options.module or options.script
    start = (module if options.module else script)(name, options.rest)
    report = None if options.json is None else Path(options.json)
    if report is not None and not report.parent.is_dir():
        raise BadUsage(
            f"--json {report}: there is no folder {report.parent}", fix="make it, or give another path"
        )
    return Prepared(start, name, options.quiet, report)


def _replaced_text(replaced: tuple[str, ...]) -> str:
    own = [name for name in replaced if name.startswith("torch.utils.checkpoint.")]
    rest = sorted({name.rpartition(".")[0] for name in replaced} - {"torch.utils.checkpoint"})
    more = f", and what {len(rest)} modules had imported of them" if rest else ""
    return f"{len(own)} names of torch.utils.checkpoint are distckpt's in this process{more}"


def _summary(counts: dict[str, Any], taken: tuple[str, ...], rank: int, size: int) -> list[str]:
    from distckpt.cli.tally import bytes_text

    who = f"rank {rank} of {size}: " if size > 1 else ""
    found = [
        f"{who}{counts['regions']} regions ran, {counts['replays']} replays, at most "
        f"{bytes_text(counts['kept'])} of region inputs kept at once"
    ]
    if taken:
        found.append(
            f"replaced by somebody else meanwhile: {', '.join(taken)}; see distckpt doctor --import MODULE"
        )
    if not counts["regions"]:
        found.append("no region ran in this process: does the script turn activation checkpointing on?")
        found.append("Next: distckpt doctor")
    return found


def _write(path: Path, rank: int, size: int, found: dict[str, Any]) -> None:
    """One file, or under a launcher one per rank: report.json becomes report.rank0.json."""
    target = path if size == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    target.write_text(json.dumps(found, indent=2) + "\n")
