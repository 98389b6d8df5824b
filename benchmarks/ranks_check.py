"""What ``Coordinator.check`` costs on 2 to 64 real gloo ranks.

python benchmarks/ranks_check.py [--worlds 2 4 8] [--rounds N] [--no-write]

Every rank is a process with its own gloo connections and its own client of one TCPStore, forked after the import of
torch, so that 64 of them fit a small machine. The coordinator is the default one, with its alarm, whose thread makes a
connection of its own after the first check; beside it the first check of coordinators with and without the alarm, in
turns. All are on one machine: with more ranks than cores the time is that of
the processes taking turns, and an upper bound for ranks that have cores of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import table, write

import distckpt as dc
from distckpt.errors import PlansDiffer

LAYERS = 48
FIRSTS = 5  # first checks, with the alarm and without


class CountingStore:
    """The store of one rank, with its requests and the bytes of keys and values counted."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.requests = 0
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name == "clone":  # the alarm's connection is its own
            return method

        def call(*args: Any) -> Any:
            answer = method(*args)
            self.requests += 1
            self.bytes += sum(map(_size, args)) + _size(answer)
            return answer

        return call


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 0


def model(regions: str) -> torch.nn.Module:
    """Small layers: only their number could matter."""
    layers = [torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(LAYERS)]
    made = torch.nn.Sequential(*layers)
    dc.apply(made, regions)
    return made


def rank_main(rank: int, world: int, folder: Path, rounds: int) -> None:
    """One rank: connect, check, and write down the times (seconds) and counts."""
    port_file = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        (folder / "port.new").write_text(str(store.port))
        (folder / "port.new").rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port_file.read_text()), world, False)
    start = time.perf_counter()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    connect = time.perf_counter() - start
    counting = CountingStore(dist.PrefixStore("bench", store))
    same, other = model("*"), model("*" if rank else "0")
    firsts: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(FIRSTS):
        for alarm in firsts:
            fresh = dc.Coordinator(store=counting, alarm=alarm)
            dist.barrier()
            start = time.perf_counter()
            fresh.check(same)
            firsts[alarm].append(time.perf_counter() - start)
            dist.barrier()
            fresh.close()
    coord = dc.Coordinator(store=counting)
    coord.check(same)
    agree, differ = [], []
    counting.requests = counting.bytes = 0
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        coord.check(same)
        agree.append(time.perf_counter() - start)
    requests, sent = counting.requests / rounds, counting.bytes / rounds
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        try:
            coord.check(other)
        except PlansDiffer:
            differ.append(time.perf_counter() - start)
    result = {"first": firsts[True], "first_without": firsts[False], "agree": agree, "differ": differ}
    result |= {"requests": requests, "bytes": sent, "connect": connect}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    time.sleep(0.2)  # rank 0 serves the store: it may not be the first to go


def run_world(world: int, rounds: int) -> dict[str, Any]:
    """Fork the ranks, wait for them, and put their findings together."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    rank_main(rank, world, folder, rounds)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"ranks of a world of {world} ended with {codes}")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    slowest = {
        kind: [max(times) for times in zip(*(f[kind] for f in found), strict=False)]
        for kind in ("first", "first_without", "agree", "differ")
    }
    return {
        "ranks": world,
        "first_ms": statistics.median(slowest["first"]) * 1e3,
        "first_without_alarm_ms": statistics.median(slowest["first_without"]) * 1e3,
        "agree_ms": statistics.median(slowest["agree"]) * 1e3,
        "agree_worst_ms": max(slowest["agree"]) * 1e3,
        "differ_ms": statistics.median(slowest["differ"]) * 1e3,
        "raised_on": sum(len(f["differ"]) == rounds for f in found),
        "requests": sum(f["requests"] for f in found),
        "bytes": sum(f["bytes"] for f in found),
        "group_ms": max(f["connect"] for f in found) * 1e3,
    }


def main() -> None:
    """Run every world and print and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run_world(world, options.rounds) for world in options.worlds]
    print(table(HEADER, [cells(row) for row in rows]))
    if not options.no_write:
        content = {"layers": LAYERS, "rounds": options.rounds, "rows": rows}
        write("ranks_check", "python benchmarks/ranks_check.py", content)


HEADER = [
    "ranks",
    "first ms",
    "no alarm",
    "agree ms",
    "worst ms",
    "differ ms",
    "raised on",
    "requests",
    "bytes",
    "bytes per rank",
    "group ms",
]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        str(row["ranks"]),
        *(f"{row[key]:.1f}" for key in ("first_ms", "first_without_alarm_ms")),
        *(f"{row[key]:.1f}" for key in ("agree_ms", "agree_worst_ms", "differ_ms")),
        str(row["raised_on"]),
        f"{row['requests']:.0f}",
        f"{row['bytes']:.0f}",
        f"{row['bytes'] / row['ranks']:.0f}",
        f"{row['group_ms']:.0f}",
    ]


if __name__ == "__main__":
    main()
