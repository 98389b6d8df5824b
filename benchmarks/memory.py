"""Peak memory of regions: ours, torch's, no regions, and the least there can be.

One unit is one activation of 1 MiB. Peaks come from the CPU allocator's events over forward and backward
together, so that temporaries count. The graph's output is held by the caller until the end, as a training
loop does.

    python benchmarks/memory.py                every case, writes benchmarks/results/memory.json
    python benchmarks/memory.py --no-write     prints only
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from engines import Engine, load
from livebytes import peak_of
from report import table, write

MIB = 1 << 20
Fn = Callable[..., Any]


def unit(kib: int) -> torch.Tensor:
    """Return one activation of ``kib`` KiB that wants a gradient."""
    return torch.randn(kib * 256).requires_grad_()


def chain(ops: int) -> Fn:
    """Return a block of ``ops`` ops; each saves its input."""

    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(ops):
            x = x.sin()
        return x

    return block


def call(engine: Engine | None, fn: Fn, *args: Any, **options: Any) -> Any:
    """Call ``fn`` as a region of an engine, or plainly."""
    return fn(*args) if engine is None else engine.region(fn, *args, **options)


def chain_case(engine: Engine | None, x: torch.Tensor, blocks: int, ops: int, **options: Any) -> None:
    """Run a chain of blocks, each one region, and its backward."""
    out = x
    for _ in range(blocks):
        out = call(engine, chain(ops), out, **options)
    out.sum().backward()
    x.grad = None


def nested_case(
    engine: Engine | None, x: torch.Tensor, blocks: int, ops: int, group: int, inner: bool
) -> None:
    """Run groups of blocks: every group one region, and every block inside it one too where ``inner``."""

    def run_group(x: torch.Tensor) -> torch.Tensor:
        for _ in range(group):
            x = call(engine if inner else None, chain(ops), x)
        return x

    out = x
    for _ in range(blocks // group):
        out = call(engine, run_group, out)
    out.sum().backward()
    x.grad = None


def partial_case(engine: Engine | None, x: torch.Tensor, times: int) -> None:
    """Take a gradient for one of two inputs ``times`` times over the same graph."""
    other = torch.randn_like(x).requires_grad_()

    def fork(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.sin().cos() + b.sin().cos().exp()

    out = call(engine, fork, x, other).sum()
    for _ in range(times):
        torch.autograd.grad(out, x, retain_graph=True)


def selective_case(engine: Engine | None, x: torch.Tensor, blocks: int, needed: bool) -> None:
    """Keep the ``sin`` outputs of every block: those that a backward needs, or those that none does."""

    def block(x: torch.Tensor) -> torch.Tensor:
        x = x.cos().cos().sin()
        return (x if needed else x + 1.0).cos().cos().cos()

    out = x
    for _ in range(blocks):
        options: dict[str, Any] = {}
        if engine is not None:
            options["context_fn"] = partial(engine.selective, [torch.ops.aten.sin.default])
        out = call(engine, block, out, **options)
    out.sum().backward()
    x.grad = None


def fan_in_case(engine: Engine | None, x: torch.Tensor, inputs: int) -> None:
    """Pass several activations to one region that is done with each early on."""

    def block(*xs: torch.Tensor) -> torch.Tensor:
        total = xs[0].sin()
        for other in xs[1:]:
            total = total + other * 2.0
        return total.sin().sin().sin()

    xs = [x * 1.0 for _ in range(inputs)]
    out = call(engine, block, *xs)
    del xs
    out.sum().backward()
    x.grad = None


# name, job, least possible units (None where no closed form is claimed)
CASES: list[tuple[str, Fn, float | None]] = [
    # 7 boundaries, the held output, ops - 1 recomputed, 2 gradient temporaries
    ("chain, 8 blocks of 4", partial(chain_case, blocks=8, ops=4), 7 + 1 + 3 + 2),
    ("chain, 8 blocks of 16", partial(chain_case, blocks=8, ops=16), 7 + 1 + 15 + 2),
    ("chain, 8 blocks of 4, early stop off", partial(chain_case, blocks=8, ops=4, early_stop=False), None),
    ("chain, 8 blocks of 4, reentrant", partial(chain_case, blocks=8, ops=4, use_reentrant=True), None),
    ("nested, 16 blocks of 4, inner only", partial(chain_case, blocks=16, ops=4), 15 + 1 + 3 + 2),
    (
        "nested, 16 blocks of 4, groups of 4, outer only",
        partial(nested_case, blocks=16, ops=4, group=4, inner=False),
        None,
    ),
    (
        "nested, 16 blocks of 4, groups of 2",
        partial(nested_case, blocks=16, ops=4, group=2, inner=True),
        None,
    ),
    (
        "nested, 16 blocks of 4, groups of 4",
        partial(nested_case, blocks=16, ops=4, group=4, inner=True),
        None,
    ),
    (
        "nested, 16 blocks of 4, groups of 8",
        partial(nested_case, blocks=16, ops=4, group=8, inner=True),
        None,
    ),
    ("partial backward, once", partial(partial_case, times=1), None),
    ("partial backward, 10 times", partial(partial_case, times=10), None),
    ("selective, kept outputs needed", partial(selective_case, blocks=4, needed=True), None),
    ("selective, kept outputs not needed", partial(selective_case, blocks=4, needed=False), None),
    ("8 inputs to one region", partial(fan_in_case, inputs=8), None),
]


def run_case(
    name: str, job: Fn, least: float | None, engines: list[Engine | None], kib: int
) -> dict[str, Any]:
    """Measure one case for every engine (None is the plain call), in units."""
    row: dict[str, Any] = {"case": name, "least": least, "peak": {}, "left": {}}
    for engine in engines:
        if engine is not None and "selective" in name and engine.selective is None:
            continue
        x = unit(kib)
        gc.collect()
        peak, left = peak_of(lambda engine=engine, x=x: job(engine, x))
        label = "none" if engine is None else engine.name
        row["peak"][label] = round(peak / (kib * 1024), 2)
        row["left"][label] = round(left / (kib * 1024), 2)
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a table."""
    names = list(rows[0]["peak"])
    header = ["case", "least possible", *names]
    lines = [
        [row["case"], "" if row["least"] is None else f"{row['least']:g}"]
        + [f"{row['peak'][name]:.1f}" if name in row["peak"] else "" for name in names]
        for row in rows
    ]
    return table(header, lines)


def main() -> None:
    """Run the table from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", default="dc,compat", help="engines next to torch, comma separated")
    parser.add_argument("--kib", type=int, default=1024, help="size of one activation in KiB")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engines: list[Engine | None] = [None, load("torch"), *(load(name) for name in options.ours.split(","))]
    rows = [run_case(name, job, least, engines, options.kib) for name, job, least in CASES]
    print(show(rows))
    if not options.no_write:
        path = write("memory", "python benchmarks/memory.py", {"unit_kib": options.kib, "rows": rows})
        print(f"\nwrote {path.name}")


if __name__ == "__main__":
    main()
