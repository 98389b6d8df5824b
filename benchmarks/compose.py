"""The long run of the composition suite: 10,000 random programs against plain autograd, to the bit.

    python benchmarks/compose.py                          dc and compat, 10,000 each
    python benchmarks/compose.py --engine dc --count 500 --seed 7 --no-write
    python benchmarks/compose.py --count 2500 --more      goes on where the result files end, for a run in parts
    python benchmarks/compose.py --again                  runs again what failed in the result files

Programs come in chunks with a seed each. A chunk that meets a disagreement stops at the shrunk program,
which is printed and counted as a failure; the other chunks go on. The result is
benchmarks/results/compose-<engine>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from composition.engines import engine
from composition.sweep import Tally, sweep

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 250


def run(name: str, count: int, start: int) -> dict[str, Any]:
    """Judge ``count`` programs with one engine and return what is worth keeping."""
    tally, failures = Tally(), []
    began = time.perf_counter()
    subject = engine(name)
    for number, first in enumerate(range(0, count, CHUNK)):
        try:
            sweep(subject, min(CHUNK, count - first), start + number, tally)
        except Exception as error:
            # without the folder of this copy, which says nothing to others
            said = [text.replace(f"{ROOT}/", "") for text in (str(error), *getattr(error, "__notes__", []))]
            program = "\n".join(said[1:]).partition("\nFailed to reproduce")[0]  # a long traceback
            failures.append({"seed": start + number, "error": said[0], "program": program})
            print(f"seed {start + number}: {said[0]}\n{failures[-1]['program']}\n", flush=True)
        done = sum(tally.verdicts.values())
        if sys.stderr.isatty():
            print(
                f"\r{name}: {done} of {count}, {len(failures)} failures", end="", file=sys.stderr, flush=True
            )
    return {
        "engine": name,
        "programs": sum(tally.verdicts.values()),
        "asked": count,
        "seeds": [start, start + (count - 1) // CHUNK],
        "seconds": round(time.perf_counter() - began),
        "verdicts": dict(tally.verdicts.most_common()),
        "failures": failures,
        "reasons": dict(tally.reasons.most_common()),
        "features": dict(sorted(tally.features.items())),
    }


def more(name: str, count: int) -> dict[str, Any]:
    """Judge ``count`` programs from the seed after the last of a result file, and add them to it."""
    result = json.loads((RESULTS / f"compose-{name}.json").read_text())
    found = run(name, count, result["seeds"][1] + 1)
    result["seeds"][1] = found["seeds"][1]
    for key in ("programs", "asked", "seconds", "failures"):
        result[key] += found[key]
    for key in ("verdicts", "reasons", "features"):
        result[key] = dict((Counter(result[key]) + Counter(found[key])).most_common())
    result["features"] = dict(sorted(result["features"].items()))
    return {key: value for key, value in result.items() if key not in ("command", "machine")}


def again(name: str) -> dict[str, Any]:
    """Run the chunks that failed in a result file once more; those that pass now are kept as ``mended``."""
    result = json.loads((RESULTS / f"compose-{name}.json").read_text())
    for failure in result["failures"]:
        found = run(name, CHUNK, failure["seed"])
        # a failed chunk counted up to its failure only, and this run counts all of it
        result["programs"] += found["programs"]
        for key in ("verdicts", "reasons", "features"):
            result[key] = dict(Counter(result[key]) + Counter(found[key]))
        where = "failures" if found["failures"] else "mended"
        result.setdefault(f"{where} now", []).append(failure)
    result["mended"] = result.get("mended", []) + result.pop("mended now", [])
    result["failures"] = result.pop("failures now", [])
    return {key: value for key, value in result.items() if key not in ("command", "machine")}


def main() -> int:
    """Run from the command line; the exit status is the number of engines with failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine", default="dc,compat", help="engines, comma separated: dc, compat, torch, plain"
    )
    parser.add_argument("--count", type=int, default=10_000, help="programs per engine")
    parser.add_argument("--seed", type=int, default=1_000, help="seed of the first chunk")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--more", action="store_true", help="add to the result files instead of new ones")
    parser.add_argument("--again", action="store_true", help="only what failed in the result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in options.engine.split(","):
        if options.again or options.more:
            result = again(name) if options.again else more(name, options.count)
        else:
            result = run(name, options.count, options.seed)
        failed += bool(result["failures"])
        print(
            f"{name}: {result['programs']} programs, {result['verdicts']}, {len(result['failures'])} failures"
        )
        if not options.no_write:
            write(f"compose-{name}", f"python benchmarks/compose.py --engine {name}", result)
    return failed


if __name__ == "__main__":
    sys.exit(main())
