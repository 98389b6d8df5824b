"""Checkpoints of a run through torch.distributed.checkpoint: all that decides a next step, on every rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from launch.errors import BadCheckpoint
from launch.options import Options
from launch.parallel import World
from launch.trainer import Trainer

# Each parameter's own keys, so that pipeline ranks do not write one list of groups over another's.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
NOTE = "run.json"  # beside the tensors: what made them, for people and for `find`


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    folder: Path
    step: int  # steps done when it was saved


class _Stateful:
    """A trainer as torch.distributed.checkpoint wants it.

    Each rank writes its data position and random state under keys of its own, so nothing is taken for a
    replica of another rank's.
    """

    def __init__(self, trainer: Trainer, rank: int) -> None:
        self._trainer = trainer
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._trainer.model, self._trainer.optimizer, options=_OPTIONS)
        mine = {"data": self._trainer.batches.position(), "rng": self._trainer.rng}
        return {"model": model, "optimizer": optimizer, f"rank{self._rank}": mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self._trainer.model,
            self._trainer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        mine = state[f"rank{self._rank}"]
        self._trainer.batches.seek(mine["data"])
        self._trainer.rng = mine["rng"]


def save(folder: Path, step: int, trainer: Trainer, options: Options, world: World) -> Path:
    """Write `folder/step-NNNNNN` after `step` steps; every rank calls it. Returns the new folder."""
    target = folder / f"step-{step:06d}"
    dcp.save({"run": _Stateful(trainer, world.rank)}, checkpoint_id=target)
    if world.first:
        note = {"step": step, "ranks": world.size, "options": options.identity()}
        part = target / (NOTE + ".part")
        part.write_text(json.dumps(note, indent=2) + "\n")
        part.rename(target / NOTE)  # the note comes last and whole: a folder with one is complete
    dist.barrier()
    return target


def find(folder: Path, options: Options, world: World) -> Found:
    """The newest complete checkpoint in `folder`, or `folder` itself.

    Raises BadCheckpoint if there is none, or if it was made by a job whose numbers this one cannot continue.
    """
    complete = [p.parent for p in sorted(folder.glob(f"step-*/{NOTE}"))]
    if (folder / NOTE).is_file():
        complete = [folder]
    if not complete:
        raise BadCheckpoint(
            f"--resume {folder} has no complete checkpoint", fix="give the folder that --save wrote to"
        )
    newest = complete[-1]
    note = json.loads((newest / NOTE).read_text())
    if note["ranks"] != world.size:
        raise BadCheckpoint(
            f"--resume {newest} was made with --nproc_per_node {note['ranks']}, not {world.size}",
            fix="start as many: each rank has random numbers of its own",
        )
    for name, value in options.identity().items():
        made = note["options"].get(name, value)  # an older run.json has fewer
        if made != value:
            raise BadCheckpoint(
                f"--resume {newest} was made with --{name.replace('_', '-')} {made}, not {value}",
                fix="give the same value",
            )
    if note["step"] >= options.steps:
        raise BadCheckpoint(
            f"--resume {newest} has done {note['step']} of {options.steps} steps already",
            fix=f"give --steps above {note['step']}",
        )
    return Found(newest, note["step"])


def load(source: Path, trainer: Trainer, world: World) -> None:
    """Bring `trainer` to where it stood when `source` was saved; every rank calls it."""
    dcp.load({"run": _Stateful(trainer, world.rank)}, checkpoint_id=source)
