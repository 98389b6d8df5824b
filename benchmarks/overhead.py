"""CPU cost of one region over the plain call, ours against torch.utils.checkpoint.

A segment is a chain of ``sin`` (and ``cos``) on four floats: every op saves exactly one tensor and does next
to no arithmetic, so what is left is the engine. Costs are microseconds of thread CPU time, forward and
backward together, with the plain call's own time taken off; they include the replay's second run of the
ops.

    python benchmarks/overhead.py              every variant, writes benchmarks/results/overhead.json
    python benchmarks/overhead.py --quick      the three headline ratios, some 15 seconds, writes nothing
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from engines import Engine, load
from report import table, write
from timing import Sample, measure, quiet

TARGETS = {1: 0.36, 10: 0.42, 50: 0.47}
# few calls in a round and many rounds: the smallest round is then one that nobody disturbed
CALLS = {1: 40, 10: 25, 50: 10}
NO_GRAD_TARGET_US = 1.0

Segment = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[], torch.Tensor]


def chain(ops: int) -> Segment:
    """Return a function of ``ops`` ops, each saving one tensor."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(ops):
            x = x.sin()
        return x

    return run


def alternating(ops: int) -> Segment:
    """Return a chain whose every second op is ``cos``, for policies that save half."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for i in range(ops):
            x = x.cos() if i % 2 else x.sin()
        return x

    return run


def _recompute_all(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return False


def _default(engine: Engine, ops: int, x: torch.Tensor, **options: Any) -> Make:
    segment = chain(ops)
    return lambda: engine.region(segment, x, **options)


def _nested(engine: Engine, ops: int, x: torch.Tensor) -> Make:
    segment = chain(ops)

    def outer(x: torch.Tensor) -> torch.Tensor:
        return engine.region(segment, x.sin()).sin()

    return lambda: engine.region(outer, x)


def _selective(engine: Engine, ops: int, x: torch.Tensor, policy: Any) -> Make | None:
    if engine.selective is None:
        return None
    segment, context_fn = alternating(ops), partial(engine.selective, policy)
    return lambda: engine.region(segment, x, context_fn=context_fn)


# name -> (maker for an engine, the plain segment that its cost is measured over)
VARIANTS: dict[str, tuple[Callable[[Engine, int, torch.Tensor], Make | None], Callable[[int], Segment]]] = {
    "default": (_default, chain),
    "rng off": (partial(_default, preserve_rng_state=False), chain),
    "early stop off": (partial(_default, early_stop=False), chain),
    "check off": (partial(_default, determinism_check="none"), chain),
    "nested": (_nested, lambda ops: chain(ops + 2)),
    "selective, list": (partial(_selective, policy=[torch.ops.aten.cos.default]), alternating),
    "selective, function": (partial(_selective, policy=_recompute_all), alternating),
    "reentrant": (partial(_default, use_reentrant=True), chain),
}


def run_variant(
    name: str, ops: int, engines: list[Engine], rounds: int, calls: int, device: str = "cpu"
) -> dict[str, Any] | None:
    """Measure one row: costs of every engine over plain, and ratios to the first engine (torch)."""
    make_for, plain = VARIANTS[name]
    x = torch.randn(4, device=device, requires_grad=True)
    segment = plain(ops)
    makers: dict[str, Make] = {"plain": lambda: segment(x)}
    for engine in engines:
        make = make_for(engine, ops, x)
        if make is not None:
            makers[engine.name] = make
    samples = measure(makers, calls=calls, rounds=rounds, grad=torch.ones(4, device=device), device=device)
    return _row(name, ops, samples, engines)


def _row(name: str, ops: int, samples: dict[str, Sample], engines: list[Engine]) -> dict[str, Any]:
    plain = samples["plain"]
    row: dict[str, Any] = {
        "variant": name,
        "saved": ops,
        "plain_us": round(plain.total_min, 2),
        "engines": {},
    }
    base_min = base_median = 0.0
    for engine in engines:
        if engine.name not in samples:
            continue
        sample = samples[engine.name]
        cost_min = sample.total_min - plain.total_min
        cost_median = sample.total_median - plain.total_median
        if engine is engines[0]:
            base_min, base_median = cost_min, cost_median
        row["engines"][engine.name] = {
            "forward_us": round(sample.forward_min - plain.forward_min, 2),
            "backward_us": round(sample.backward_min - plain.backward_min, 2),
            "total_us": round(cost_min, 2),
            "total_median_us": round(cost_median, 2),
            "ratio": round(cost_min / base_min, 3),
            "ratio_median": round(cost_median / base_median, 3),
        }
    return row


def run_no_grad(engines: list[Engine], rounds: int, calls: int) -> dict[str, Any]:
    """Measure a region under ``no_grad``: microseconds over calling the function itself."""
    x = torch.randn(4)

    def segment(x: torch.Tensor) -> torch.Tensor:
        return x

    makers: dict[str, Make] = {"plain": lambda: segment(x)}
    for engine in engines:
        makers[engine.name] = lambda engine=engine, call=engine.checkpoint: call(segment, x, **engine.options)
    with torch.no_grad():
        samples = measure(makers, calls=calls * 10, rounds=rounds, grad=None)
    return _row("no_grad", 0, samples, engines)


def show(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    header = [
        "variant",
        "saved tensors",
        "engine",
        "forward us",
        "backward us",
        "total us",
        "ratio",
        "by median",
    ]
    lines: list[list[str]] = []
    for row in rows:
        for name, cost in row["engines"].items():
            cells = [cost[key] for key in ("forward_us", "backward_us", "total_us")]
            ratios = [cost[key] for key in ("ratio", "ratio_median")]
            lines.append(
                [row["variant"], str(row["saved"]), name]
                + [f"{cell:.1f}" if row["variant"] != "no_grad" else f"{cell:.2f}" for cell in cells]
                + [f"{ratio:.3f}" for ratio in ratios]
            )
    return table(header, lines)


def headline(rows: list[dict[str, Any]], ours: list[Engine]) -> str:
    """Say how the default region stands against its targets."""
    lines: list[str] = []
    for row in rows:
        if row["variant"] == "default":
            for engine in ours:
                ratio, target = row["engines"][engine.name]["ratio"], TARGETS[row["saved"]]
                verdict = "meets" if ratio <= target else "misses"
                lines.append(f"{engine.name}: {row['saved']} saved: {ratio:.3f} of torch, {verdict} {target}")
        if row["variant"] == "no_grad":
            for engine in ours:
                cost = row["engines"][engine.name]["total_us"]
                verdict = "meets" if cost <= NO_GRAD_TARGET_US else "misses"
                lines.append(
                    f"{engine.name}: no_grad: {cost:.2f} us over plain, {verdict} {NO_GRAD_TARGET_US} us"
                )
    return "\n".join(lines)


def main() -> None:
    """Run the table from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="headline rows only; writes no result file")
    parser.add_argument(
        "--ours", help="engines next to torch, comma separated (default dc,compat; with --quick dc)"
    )
    parser.add_argument("--only", help="variants, comma separated")
    parser.add_argument("--saved", default="1,10,50", help="saved tensors per region, comma separated")
    parser.add_argument("--rounds", type=int, help="timed rounds per row")
    parser.add_argument("--calls", type=int, help="calls per round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()

    ours = [load(name) for name in (options.ours or ("dc" if options.quick else "dc,compat")).split(",")]
    engines = [load("torch"), *ours]
    names = options.only.split(",") if options.only else (["default"] if options.quick else list(VARIANTS))
    rounds = options.rounds or (80 if options.quick else 120)
    quiet()
    rows: list[dict[str, Any]] = []
    for name in names:
        for ops in map(int, options.saved.split(",")):
            if name != "no_grad":
                row = run_variant(name, ops, engines, rounds, options.calls or CALLS.get(ops, 40))
                if row is not None:
                    rows.append(row)
    if not options.only or "no_grad" in names:
        rows.append(run_no_grad(engines, rounds, options.calls or CALLS[1]))
    print(show(rows))
    print()
    print(headline(rows, ours))
    if not (options.quick or options.no_write or options.only):
        path = write("overhead", "python benchmarks/overhead.py", {"rounds": rounds, "rows": rows})
        print(f"\nwrote {path.name}")


if __name__ == "__main__":
    main()
