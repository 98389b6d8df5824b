"""Many checks of three forked ranks each, of which one is killed or stopped before a certain request to the store.

Reports, by case, what each rank got and after how many seconds. Ranks are forked, so that there can be many.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import distckpt as dc
from distckpt.ranks import World
from tests.ranks.spawn import report

SIZE = 3
TIMEOUT = (
    30.0  # long, as the machine may be busy: a rank that is slow is not to be taken for one that is gone
)


class Dying:
    """The store of one rank, which sends itself ``sign`` instead of its request number ``last``."""

    def __init__(self, store: Any, last: int | None, sign: int) -> None:
        self.store, self.left, self.sign = store, last, sign

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        def call(*args: Any) -> Any:
            if self.left == 0:
                self.left = None
                os.kill(os.getpid(), self.sign)
            elif self.left is not None:
                self.left -= 1
            return method(*args)

        return call


def model(regions: str) -> nn.Module:
    made = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    dc.apply(made, regions)
    return made


def work(rank: int, port: int, case: str, who: int, last: int, sign: int, regions: dict[int, str]) -> str:
    """What one rank gets. Rank 2 comes last and is the one to compare."""
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    while rank == 2 and store.add(f"distckpt/{case}/0/check/0/here", 0) < 2:
        time.sleep(0.02)
    own = Dying(store, last if rank == who else None, sign)
    world = World(rank, SIZE, rank, "forked", run=case)
    coord = dc.Coordinator("cpu", world=world, store=own, alarm=False, timeout=TIMEOUT)
    return coord.check(model(regions.get(rank, "*"))).hash


def forked(folder: Path, rank: int, work: Callable[[], Any]) -> int:
    """Do ``work`` in a process of its own and write down what came of it."""
    child = os.fork()
    if child:
        return child
    start = time.monotonic()
    try:
        try:
            found: dict[str, Any] = {"result": work()}
        except Exception as error:
            found = {"code": getattr(error, "code", None), "text": str(error)}
        found["seconds"] = time.monotonic() - start
        (folder / f"{rank}.new").write_text(json.dumps(found))
        (folder / f"{rank}.new").rename(folder / f"{rank}.json")
    finally:
        os._exit(0)


def cases() -> dict[str, tuple[int, int, int, dict[int, str]]]:
    """Who goes before which request, how, and what the ranks' regions are."""
    found: dict[str, tuple[int, int, int, dict[int, str]]] = {}
    for how, sign in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        for last in range(6):  # add, set, compare_set, wait, multi_get, compare_set
            found[f"agree, {how} {last}"] = 2, last, sign, {}
        for last in range(2, 6):
            found[f"differ, {how} {last}"] = 2, last, sign, {1: "0"}
        found[f"judge asked, {how}"] = 2, 8, sign, {2: "0"}  # then wait and get: the text is not written
        found[f"judge reads texts, {how}"] = 2, 9, sign, {2: "0"}
        found[f"judge concludes, {how}"] = (
            2,
            13,
            sign,
            {1: "0"},
        )  # comparing again, before it writes what came of it
        found[f"member asked, {how}"] = 1, 4, sign, {1: "0"}
    return found


def main() -> None:
    """Run all cases at once: they mostly wait."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        port_file = Path(name) / "port"
        server = os.fork()  # a process with the server's threads should not fork
        if server == 0:
            store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            (Path(name) / "new").write_text(str(store.port))
            (Path(name) / "new").rename(port_file)
            while True:
                time.sleep(1)
        while not port_file.exists():
            time.sleep(0.05)
        port = int(port_file.read_text())
        running: dict[str, list[int]] = {}
        for number, (case, (who, last, sign, regions)) in enumerate(cases().items()):
            folder = Path(name) / case
            folder.mkdir()

            running[case] = [
                forked(folder, rank, partial(work, rank, port, f"case{number}", who, last, sign, regions))
                for rank in range(SIZE)
            ]
        for case, children in running.items():
            who, _, sign, _ = cases()[case]
            folder, others = Path(name) / case, [r for r in range(SIZE) if r != who]
            end = time.monotonic() + 5 * TIMEOUT
            while time.monotonic() < end and not all((folder / f"{r}.json").exists() for r in others):
                time.sleep(0.05)
            if sign == signal.SIGSTOP:  # it wakes up after the others have their error
                os.kill(children[who], signal.SIGCONT)
                while time.monotonic() < end and not (folder / f"{who}.json").exists():
                    time.sleep(0.05)
            results[case] = [
                json.loads((folder / f"{r}.json").read_text()) if (folder / f"{r}.json").exists() else None
                for r in range(SIZE)
            ]
            for child in children if case != list(running)[-1] else [*children, server]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    report(results)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
