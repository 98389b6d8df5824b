"""Three forked ranks: rank 0 serves the store, gives rank 2 up after the timeout, and leaves; then rank 2 comes."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

import distckpt as dc
from distckpt.ranks import World
from tests.ranks.jobs.dying import forked
from tests.ranks.spawn import report

TIMEOUT = 3.0


def given(rank: int, folder: Path) -> str:
    """Each rank has made its connection before anything else."""
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        (folder / "new").rename(port)
    while not port.exists():
        time.sleep(0.02)
    store = store if rank == 0 else dist.TCPStore("127.0.0.1", int(port.read_text()), None, False)
    world = World(rank, 3, rank, "forked", run="given")
    if rank == 2:
        wait_for_the_others(folder)
    return dc.Coordinator("cpu", world=world, store=store, alarm=False, timeout=TIMEOUT).check().hash


def environment(rank: int, folder: Path) -> str:
    """The launcher's environment says where to meet, and a late rank finds nobody there."""
    if rank == 2:
        wait_for_the_others(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    return dc.Coordinator("cpu", alarm=False, timeout=TIMEOUT).check().hash


def wait_for_the_others(folder: Path) -> None:
    while not all((folder / f"{rank}.json").exists() for rank in (0, 1)):
        time.sleep(0.02)
    time.sleep(0.5)  # their processes end


def main() -> None:
    """Both ways, one after the other."""
    for name in [key for key in os.environ if key.startswith("TORCHELASTIC")]:
        del os.environ[name]  # no agent serves this store
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    found = {}
    for work in (given, environment):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            children = [forked(folder, r, partial(work, r, folder)) for r in range(3)]
            for child in children:
                os.waitpid(child, 0)
            found[work.__name__] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]
    report(found)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
