"""Write docs/benchmarks.md from the result files.

python benchmarks/docs.py            writes the page
python benchmarks/docs.py --check    fails when the page is not what the result files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs_ranks import ranks_parts
from gpt_block import show as show_block
from overhead import TARGETS
from overhead import show as show_overhead
from report import RESULTS, load, source, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"

INTRO = """# Benchmarks

Every number here comes from a result file in `benchmarks/results/`, and every section names the command that makes
its file. `python benchmarks/docs.py` turns the files into this page. Compare ratios, not microseconds: all
contestants of a row run interleaved in one process, so a ratio survives a change of machine far better than a time.

`torch` is `torch.utils.checkpoint` of the torch version named under each table, `dc` is `dc.checkpoint`, and `compat`
is `distckpt.compat.checkpoint`, which keeps torch's behaviour and skips the checks that `dc` adds.
"""

OVERHEAD = """## CPU cost of a region

Microseconds of thread CPU time that one region costs over calling the function itself, forward and backward
together, the replay's second run of the ops included. The function is a chain of elementwise ops on four floats, so
that there is next to no arithmetic in it and every op saves one tensor. Random state and metadata check are on unless
the row says otherwise. The ratio is to torch in the same rows; lower is better.

- `nested`: a region inside a region. `selective, list`: a `context_fn` whose list names every second op.
  `selective, function`: one whose policy function recomputes everything.
- `no_grad`: the cost over a plain call when gradients are off.
"""

MEMORY = """## Peak memory

Peak of one forward and backward, in units of one activation (1 MiB), temporaries and gradients included; `none` runs
without regions. The least possible on a chain is counted by hand: the boundaries between blocks, the output that the
caller holds, what one block recomputes, and the two gradients that an op has in hand.
"""

GPT = """## One GPT block in bf16

Attention, MLP, two norms and dropout, forward and backward in the middle of a model. `held` is what the block keeps
between its forward and its backward.
"""

GPU = """## On a GPU

The CUDA tests, the cost of a region on tensors of the GPU (wall clock, the queue empty), one GPT block in bf16 eagerly
and as a CUDA graph, and the peak memory of a step: live storages, counted after every operator, beside the
allocator's peak.
"""


COMPOSE = """## Proof by composition

Random programs (dropout, views, in-place ops, nested and selective regions, gradients taken inside a region, autocast,
repeated, partial and double backward, tensors passed in every way) run with regions and without. Outputs, gradients,
buffers and the generator's final state must agree with plain autograd to the bit; reentrant gradients, which add up
in another order, with plain autograd or with torch's reentrant engine. `refused` programs change in place what a
region needs again, and got an error that says so. `no reference` means that the program raises without any region,
`left out` that it cannot be compared (the reasons are in the result file). `mended` counts what failed in the long
run, was repaired, and passes when its programs are drawn again; the tests in
`tests/composition/test_regressions.py` hold everything that was ever found.
"""


def overhead_part(result: dict[str, Any]) -> str:
    """Render the table of CPU costs."""
    rows: list[list[str]] = []
    for row in result["rows"]:
        costs, digits = row["engines"], 2 if row["variant"] == "no_grad" else 1
        target = f"{TARGETS[row['saved']]}" if row["variant"] == "default" else ""
        target = "1 us" if row["variant"] == "no_grad" else target
        line = [row["variant"], str(row["saved"] or ""), f"{costs['torch']['total_us']:.{digits}f}"]
        for name in ("dc", "compat"):
            cost = costs[name]
            line += [f"{cost['total_us']:.{digits}f}", f"{cost['ratio']:.2f}", f"{cost['ratio_median']:.2f}"]
        rows.append([*line, target])
    header = ["variant", "saved tensors", "torch us", "dc us", "dc ratio", "by median"]
    header += ["compat us", "compat ratio", "by median", "target"]
    return "\n".join([OVERHEAD, table(header, rows), "", source(result)])


def memory_part(result: dict[str, Any]) -> str:
    """Render the table of peaks."""
    rows = []
    for row in result["rows"]:
        least = "" if row["least"] is None else f"{row['least']:g}"
        rows.append(
            [row["case"], least, *(f"{row['peak'][name]:.1f}" for name in ("none", "torch", "dc", "compat"))]
        )
    return "\n".join(
        [
            MEMORY,
            table(["case", "least possible", "none", "torch", "dc", "compat"], rows),
            "",
            source(result),
        ]
    )


def gpt_part() -> str:
    """Render the GPT block of every device measured so far."""
    parts = [GPT]
    for device in ("cuda", "cpu"):
        result = load(f"gpt_block-{device}")
        if result is None:
            parts.append(f"Not run on {device} yet: `python benchmarks/gpt_block.py --device {device}`.\n")
            continue
        rows = []
        base = {row["mode"]: row["ms"] for row in result["rows"] if row["engine"] == "none"}
        for row in result["rows"]:
            if row["ms"] is None:
                rows.append([row["mode"], row["engine"], "", "", "", row["error"]])
                continue
            held = "" if row["held"] is None else f"{row['held'] / 2**20:.1f}"
            ratio = f"{row['ms'] / base[row['mode']]:.2f}"
            equal = "yes" if row["equal"] else "no"
            rows.append([row["mode"], row["engine"], f"{row['ms']:.1f}", ratio, held, equal])
        header = ["mode", "engine", "step ms", "of none", "held MiB", "gradients equal to the bit"]
        size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
        parts += [table(header, rows), "", f"Size: {size}. {source(result)}"]
    return "\n".join(parts)


def gpu_part() -> str:
    """Render every GPU that `benchmarks/gpu.py` has run on."""
    parts, found = [GPU], sorted(RESULTS.glob("gpu-*.json"))
    if not found:
        parts.append("Not run on a GPU yet: `make gpu`, or `python3 benchmarks/gpu.py` from a bare tree.\n")
    for path in found:
        result = load(path.stem)
        assert result is not None
        parts += [f"### {result['machine']['accelerator']}\n", *_gpu_rows(result["parts"]), source(result)]
    return "\n".join(parts)


def _gpu_rows(parts: dict[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if "error" in part:
            yield f"`{name}` failed: {part['error']}\n"
        elif name == "tests":
            yield "CUDA tests: " + ", ".join(f"{n} {word}" for word, n in part["counts"].items()) + ".\n"
        elif name == "memory":
            rows = [
                [r["engine"], *(f"{r[key] / 2**20:.1f}" for key in ("counted", "allocated"))]
                + [f"{r['allocated'] / r['counted']:.3f}"]
                for r in part["rows"]
            ]
            yield (
                table(["peak of a step", "live bytes MiB", "allocator MiB", "allocator / counted"], rows)
                + "\n"
            )
        else:
            yield (show_block if name == "block" else show_overhead)(part["rows"]) + "\n"


def compose_part() -> str:
    """Render the long runs of the composition suite."""
    parts, rows, sources = [COMPOSE], [], []
    kinds = ("equal", "refused", "no reference", "left out")
    for name in ("dc", "compat"):
        result = load(f"compose-{name}")
        if result is not None:
            counts = [str(result["verdicts"].get(kind, 0)) for kind in kinds]
            features = str(len(result["features"]))
            failed = [str(len(result["failures"])), str(len(result.get("mended", [])))]
            rows.append([name, str(result["programs"]), *counts, *failed, features])
            sources.append(source(result))
    header = ["engine", "programs", *kinds, "failures", "mended", "features covered"]
    return "\n".join([*parts, table(header, rows), "", *sources])


def page() -> str:
    """Return the whole page."""
    overhead, memory = load("overhead"), load("memory")
    parts = [INTRO]
    parts += [overhead_part(overhead)] if overhead else []
    parts += [memory_part(memory)] if memory else []
    parts += [gpt_part(), gpu_part(), compose_part(), *ranks_parts()]
    return "\n".join(parts).rstrip() + "\n"


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    if options.check:
        return int(not PAGE.exists() or PAGE.read_text() != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
