"""Saves on two ranks that are killed ahead of every call to the file system in turn; what they leave is loaded again.

A program: `python -m tests.launch.killed FOLDER`. Torch is imported once, and every rank is a fork. Prints JSON.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

import distckpt as dc
from launch import state
from launch.folder import check_files, read_note, steps
from launch.options import Options
from launch.parallel import World
from launch.trainer import Trainer

RANKS = 2
TEXT = (torch.arange(4096) * 2654435761 >> 7).to(torch.uint8)
CALLS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
}
OPTIONS = {"ckpt": "none", "layers": 1, "width": 8, "context": 8, "batch": 2, "steps": 4}


def fork(body: Callable[[World], Any]) -> tuple[list[int], Any]:
    """Run ``body`` on every rank; the ranks' wait statuses, and what the first returned."""
    with tempfile.TemporaryDirectory() as meet:
        answer = Path(meet, "answer")
        children = []
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                os.setpgid(0, children[0] if children else 0)
                signal.alarm(300)  # a rank that hangs does not stay
                os.dup2(os.open(f"{meet}/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
                dist.init_process_group(
                    "gloo", init_method=f"file://{meet}/store", rank=rank, world_size=RANKS
                )
                said = body(World(rank, RANKS, dc.Coordinator()))
                if rank == 0:
                    answer.write_text(json.dumps(said))
                os._exit(0)
            os.setpgid(child, children[0] if children else child)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if not answer.exists() and all(os.WIFEXITED(status) for status in statuses):
            sys.stderr.write(Path(meet, "log").read_text())
        return statuses, json.loads(answer.read_text()) if answer.exists() else None


def train(
    place: Path,
    world: World,
    *,
    to: int,
    resume: Path | None = None,
    scale: float = 1.0,
    before: Mapping[int, Callable[[], None]] = MappingProxyType({}),
) -> str:
    """Train to step ``to`` and save there; ``scale`` makes other numbers, ``before`` is called ahead of the save."""
    options = Options(**OPTIONS, save=place)  # type: ignore[arg-type]
    trainer = Trainer(options, "none", TEXT, world)
    start = 0
    if resume is not None:
        found = state.find(resume, options, world)
        state.load(found, trainer, world)
        start = found.step
    for _ in range(start, to):
        with trainer.own_rng():
            trainer.step(*trainer.batches.next())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(scale)
    parameters = trainer.digest()["parameters"]
    dist.barrier()
    before.get(world.rank, lambda: None)()
    state.save(place, to, trainer, options, world)
    return parameters


def die_at(number: int, place: Path, die: Callable[[], None]) -> None:
    """End this process, or all, ahead of its ``number``-th call to the file system below ``place``."""
    seen = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CALLS and str(arguments[0]).startswith(str(place)):
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(hear)


def die_writing() -> None:
    """End this process in the middle of its next file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def alone() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def together() -> None:
    os.killpg(0, signal.SIGKILL)


def learned() -> list[str]:
    """The modules that a save imports: here once, so that no rank has to."""
    before = set(sys.modules)
    with tempfile.TemporaryDirectory() as place:
        _, names = fork(lambda world: [train(Path(place), world, to=2), *(set(sys.modules) - before)][1:])
    return names


def kills(where: Path, template: Path, rank: int, die: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Save step 4 in copies of ``template``, killed ahead of call 1, 2, ... of ``rank``, until a save gets through."""
    for number in itertools.count(1):
        place = Path(tempfile.mkdtemp(dir=where), "run")
        shutil.copytree(template, place)
        before = partial(die_at, number, place, die)
        statuses, _ = fork(partial(train, place, to=4, before={rank: before}))
        yield {"template": template.name, "rank": rank, "die": die.__name__, **left(place, statuses)}
        if statuses == [0, 0]:
            return


def left(place: Path, statuses: list[int]) -> dict[str, Any]:
    """What a save left behind: who was killed, which steps are whole, and which run's step 4 is there."""
    found = {}
    for step in steps(place):
        note = read_note(step)
        check_files(step, note, 0, 1)
        found[step.name] = {name: what for name, what in note.files.items() if name.endswith(".distcp")}
    killed = [os.WIFSIGNALED(status) and os.WTERMSIG(status) for status in statuses]
    hidden = len(list(place.glob(".step-*")))
    return {"place": str(place), "killed": killed, "steps": found, "hidden": hidden}


def resume(place: Path) -> dict[str, Any]:
    """Go on where a kill left ``place``: save step 4 again, from step 2, over all that is there."""
    statuses, parameters = fork(partial(train, place, to=4, resume=place / "step-000002"))
    return {"parameters": parameters, **left(place, statuses)}


def main(where: Path) -> dict[str, Any]:
    for name in learned():
        importlib.import_module(name)
    new, over, done = where / "new", where / "over", where / "done"
    fork(partial(train, new, to=2))
    shutil.copytree(new, over)
    shutil.copytree(new, done)
    fork(partial(train, over, to=4, scale=2.0))
    statuses, parameters = fork(partial(train, done, to=4))
    cases = [(over, 0, together), (over, 1, alone), (over, 1, together), (new, 0, alone)]
    found = [kill for template, rank, die in cases for kill in kills(where, template, rank, die)]
    cut = where / "cut"
    shutil.copytree(new, cut)
    died, _ = fork(partial(train, cut, to=4, before={1: die_writing}))
    return {
        "new": left(new, [0, 0]),
        "over": left(over, [0, 0]),
        "done": {"parameters": parameters, **left(done, statuses)},
        "cut": left(cut, died),
        "kills": found,
        # one of those that left most: both shards, and no step 4
        "resumed": resume(
            Path(max(found, key=lambda kill: (kill["hidden"], len(kill["steps"]) == 1))["place"])
        ),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve())))
