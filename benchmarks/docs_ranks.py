"""The sections of docs/benchmarks.md that are about many ranks."""

from __future__ import annotations

from typing import Any

from ranks_check import HEADER, cells
from ranks_fsdp import show as ranks_fsdp_table
from report import load, source, table

RANKS_CHECK = """## Agreement of ranks

`Coordinator.check` on real gloo ranks, one process each, all on one machine: with more ranks than cores they take
turns, so the times are bounds from above. `first` is the first check of a default coordinator, which starts its alarm,
and `no alarm` that of one without, in turns in one run; both are medians of the slowest rank's time. `agree` is the
median over later checks, while the alarms make their connections, `worst` the slowest check, `differ` the time until
the last rank has raised when one rank has other regions. `requests` and `bytes` (keys and values) are those of one
check, all ranks together: 6 requests per rank and 8 more in all. `group` is what `init_process_group` takes for the
same ranks, with look-ups of host names.
"""

RANKS_FSDP = """## FSDP2 on two ranks

One step of four small GPT blocks and a head: all-gathers, reduce-scatters, how often a block's forward runs, and wall
clock. `none` has no regions; `torch` has torch's `checkpoint_wrapper` inside each block's unit; `dc` is
`coord.fully_shard`. Ratios are to torch in the same layout; lower is better. `prefetched by hand` names for each unit
the two that follow it (`set_modules_to_forward_prefetch`): in a replay that asks for units whose backward is over, and
torch gathers them for nothing.
"""

PIPELINE = """## Pipeline stages

Real gloo ranks. `none` has no regions, `torch` is `torch.utils.checkpoint`, `alone` is `dc.apply` without more,
`default` is `coord.attach(schedule)`, and `attached` is `coord.attach(schedule, ahead="1 micro-batch")`; a table
without `default` is from before it was another one.
The times of the first two tables are of ranks that share two cores, so they
say little about waiting; the runs of a block are exact. Runs are per micro-batch, the least and the most of any
block; 1 is the forward.
"""

WAITS = """### Replay while the gradient is on its way

1F1B, blocks that compute. `after` is `attach(early_replay=False)`: replays wait for their gradient. `default` replays
the newest region early, `early only` all of them, and `attached` keeps those of the last stage as well. Where the table
has no `default`, the last stage kept its final region under `after`.
"""

SLEEP = """### The same with blocks that sleep

A block sleeps one unit of time in its forward and its replay and two in its backward, so ranks wait as they would on
machines of their own. A simulation of 1F1B without communication promised 4.5 to 7.6 % for early replay.
"""

PARTITION = """## Partitioned inputs

Regions on blocks whose inputs are equal on every rank of a group, on real gloo ranks: `whole` keeps the inputs on every
rank, `partitioned` a part on each and gathers them for the replay, `one ahead` has the gather of the next region
under way meanwhile. gloo on one machine is all copying, on the cores that also compute, so little of it can be
hidden; in the rows with `link +ms` each gather takes so much longer without keeping a core busy, as over a network.
Times are of forward and backward between two barriers.
"""


def ranks_check_part(result: dict[str, Any]) -> str:
    """Render the cost of agreeing, by world size."""
    rows = [cells(row) for row in result["rows"]]
    size = f"{result['layers']} regions on each rank, {result['rounds']} checks of each kind. "
    return "\n".join([RANKS_CHECK, table(HEADER, rows), "", size + source(result)])


def ranks_fsdp_part(result: dict[str, Any]) -> str:
    """Render FSDP2 on two ranks."""
    size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
    return "\n".join([RANKS_FSDP, ranks_fsdp_table(result["rows"]), "", f"Size: {size}. {source(result)}"])


def _runs(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


NAMES = {"early": "attached"}


def _measured(found: dict[str, Any], *engines: str) -> list[str]:
    """Those of ``engines`` that were measured in every row."""
    return [engine for engine in engines if all(engine in row["engines"] for row in found["rows"])]


def pipeline_part() -> str:
    """Render what pipelines cost, of the parts measured so far."""
    parts = [PIPELINE]
    found = load("ranks_pipeline-schedules")
    if found is not None:
        rows = []
        measured = _measured(found, "none", "torch", "alone", "default", "early")
        for row in found["rows"]:
            engines = row["engines"]
            line = [row["schedule"]]
            for name in measured:
                line += [f"{engines[name]['seconds'] * 1e3:.0f}"]
                line += [_runs(*engines[name]["runs"])] if name != "none" else []
            rows.append(line)
        header = ["schedule, 2 ranks"]
        for name in measured:
            header += [f"{NAMES.get(name, name)} ms"] + (["runs"] if name != "none" else [])
        parts += [table(header, rows), "", source(found)]
    for name, text in (("waits", WAITS), ("sleep", SLEEP)):
        found = load(f"ranks_pipeline-{name}")
        if found is not None:
            rows = []
            measured = _measured(found, "none", "torch", "alone", "after", "default", "early only", "early")
            bases, savers = (
                _measured(found, "torch", "alone"),
                _measured(found, "default", "early only", "early"),
            )
            for row in found["rows"]:
                times = {engine: cost["seconds"] for engine, cost in row["engines"].items()}
                line = [str(row["ranks"]), str(row["micro_batches"])]
                line += [f"{times[e] * 1e3:.0f}" for e in measured]
                line += [f"{100 * (1 - times[e] / times[base]):.1f} %" for base in bases for e in savers]
                rows.append(line)
            header = ["ranks", "micro-batches"]
            header += [f"{NAMES.get(e, e)} ms" for e in measured]
            header += [f"{NAMES.get(e, e)} saves of {base}" for base in bases for e in savers]
            parts += [text, table(header, rows), "", source(found)]
    return "\n".join(parts)


def partition_part(result: dict[str, Any]) -> str:
    """Render what partitioned inputs save and cost."""
    whole = {row["link_ms"]: row["ms_median"] for row in result["rows"] if row["variant"] == "whole"}
    rows = [
        [
            row["variant"],
            f"{row['link_ms']:g}",
            f"{row['kept_bytes'] / 2**20:.2f}",
            f"{row['ms_median']:.1f}",
            f"{row['ms_median'] / whole[row['link_ms']]:.2f}",
            str(row["gathers"]),
            str(row["prefetched"]),
            "yes" if row["equal"] else "no",
        ]
        for row in result["rows"]
    ]
    header = ["inputs", "link +ms", "kept MiB per rank", "step ms, median", "of whole", "gathers", "ahead"]
    header += ["gradients equal to the bit"]
    size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
    size = f"{result['ranks']} ranks, {size}; {result['rounds']} rounds, interleaved. {source(result)}"
    return "\n".join([PARTITION, table(header, rows), "", f"Size: {size}"])


def ranks_parts() -> list[str]:
    """Every section whose result file exists."""
    sections = {
        "ranks_check": ranks_check_part,
        "ranks_fsdp": ranks_fsdp_part,
        "ranks_partition": partition_part,
    }
    found = {name: load(name) for name in sections}
    parts = [sections[name](result) for name, result in found.items() if result is not None]
    return [*parts[:2], pipeline_part(), *parts[2:]]
