"""Bytes and step time of partitioned inputs on real gloo ranks, with the gather ahead and without.

python benchmarks/ranks_partition.py                                      writes results/ranks_partition.json
python benchmarks/ranks_partition.py --rounds 1 --tokens 64 --no-write    prints only

``link +ms`` rows run over a link that makes each gather take longer without keeping a processor busy, as a network
does; gloo on one machine is all copying.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from report import table, write

import distckpt as dc
from distckpt._torch_dist import all_gather
from distckpt.ranks import partition as room
from distckpt.ranks.partition import Counts, Partition

WIDTH, HIDDEN, BLOCKS = 256, 512, 8
VARIANTS: dict[str, dict[str, Any] | None] = {
    "whole": None,
    "partitioned": {"prefetch": False},
    "partitioned, one ahead": {"prefetch": True},
}
LINKS = (0.0, 10.0)  # ms that a gather takes longer


class Late:
    """A gather that is not over before its time: the link is slow, the processor is free."""

    def __init__(self, work: Any, end: float) -> None:
        self.work, self.end = work, end

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.end - time.perf_counter()))


def slow(milliseconds: float) -> Any:
    """What gathers parts, over a link that takes so much longer."""

    def gather(*args: Any, **options: Any) -> Late:
        end = time.perf_counter() + milliseconds / 1e3
        return Late(all_gather(*args, **options), end)

    return gather if milliseconds else all_gather


def block() -> torch.nn.Module:
    """A block whose inputs are equal on every rank."""
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH)
    )


def step(model: torch.nn.Module, x: torch.Tensor, partition: Partition | None) -> list[torch.Tensor]:
    """One forward and backward, every block a region; returns the gradients."""
    region = functools.partial(dc.checkpoint, partition=partition) if partition else dc.checkpoint
    y = x
    for layer in model.children():
        y = region(layer, y)
    return list(torch.autograd.grad(y.sum(), [x, *model.parameters()]))


def measure(rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Every link and variant, interleaved, on this rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(block() for _ in range(BLOCKS)))
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    partitions = {
        name: None if options is None else Partition(dist.group.WORLD, min_bytes=0, **options)
        for name, options in VARIANTS.items()
    }
    plain = step(model, x, None)
    equal = {
        name: all(map(torch.equal, plain, step(model, x, p))) for name, p in partitions.items()
    }  # and a warm-up
    rows = []
    for link in LINKS:
        room.all_gather = slow(link)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        counts: dict[str, Counts] = {}
        for _ in range(rounds):
            for name, p in partitions.items():
                if p is not None:
                    p.counts = Counts()
                dist.barrier()
                start = time.perf_counter()
                step(model, x, p)
                dist.barrier()
                times[name].append((time.perf_counter() - start) * 1e3)
                counts[name] = Counts() if p is None else p.counts
        rows += [
            {
                "link_ms": link,
                "variant": name,
                "kept_bytes": counts[name].kept or BLOCKS * x.numel() * x.element_size(),
                "gathers": counts[name].gathers,
                "prefetched": counts[name].prefetched,
                "ms_min": min(times[name]),
                "ms_median": statistics.median(times[name]),
                "equal": equal[name],
            }
            for name in VARIANTS
        ]
    return rows


def work(rank: int, world: int, folder: str, rounds: int, tokens: int) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = measure(rounds, tokens)
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--no-write", action="store_true", help="leave the result file alone")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options.ranks, folder, options.rounds, options.tokens), nprocs=options.ranks)
        rows = torch.load(Path(folder) / "rows.pt")
    header = ["link +ms", "variant", "kept MiB per rank", "step ms", "gathers", "ahead", "equal"]
    lines = [
        [
            f"{row['link_ms']:g}",
            row["variant"],
            f"{row['kept_bytes'] / 2**20:.2f}",
            f"{row['ms_median']:.1f}",
            str(row["gathers"]),
            str(row["prefetched"]),
            "yes" if row["equal"] else "no",
        ]
        for row in rows
    ]
    print(table(header, lines))
    if not options.no_write:
        size = {"tokens": options.tokens, "width": WIDTH, "hidden": HIDDEN, "blocks": BLOCKS}
        write(
            "ranks_partition",
            "python benchmarks/ranks_partition.py",
            {"ranks": options.ranks, "rounds": options.rounds, "size": size, "rows": rows},
        )


if __name__ == "__main__":
    main()
