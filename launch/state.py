"""Checkpoints of a run through torch.distributed.checkpoint: all that decides a next step, on every rank."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from launch.errors import BadCheckpoint, LaunchError, NotSaved, UnsafeCheckpoint, WouldOverwrite
from launch.folder import NOTE, Damaged, Note, begin, check_files, digest, number, publish, read_note, steps
from launch.options import Options
from launch.parallel import World, agree, everyone, once, shared
from launch.reader import NotData, Planner, Reader, read_index
from launch.trainer import Trainer

T = TypeVar("T")

# Each parameter's own keys, so that pipeline ranks do not write one list of groups over another's.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint whose files are as they were saved."""

    folder: Path
    note: Note
    damaged: tuple[str, ...] = ()  # newer ones that are not, and what is wrong with them

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return self.note.step


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
        torch.Generator().set_state(mine["rng"])  # raises if it is none, as it is set in every step only
        self._trainer.rng = mine["rng"]


def save(folder: Path, step: int, trainer: Trainer, options: Options, world: World) -> Path:
    """Write `folder/step-NNNNNN` after `step` steps, whole or not at all. Collective. Returns the new folder.

    Raises NotSaved, on every rank, if it cannot be written.
    """
    part = once(lambda: _writing(folder, lambda: begin(folder)))
    try:
        try:
            dcp.save({"run": _Stateful(trainer, world.rank)}, checkpoint_id=part)
        except dcp.CheckpointException as failed:
            raise _not_saved(folder, _first(failed)) from None
        names = once(lambda: _writing(folder, lambda: sorted(file.name for file in part.iterdir())))
        share = names[world.rank :: world.size]
        digests = shared(lambda: _writing(folder, lambda: {name: digest(part / name) for name in share}))
        files = {name: of_rank[name] for of_rank in digests for name in of_rank}
        note = Note(step, world.size, options.identity(), files)
        return once(lambda: _writing(folder, lambda: publish(part, note)))
    except LaunchError:
        if world.first:
            shutil.rmtree(part, ignore_errors=True)  # the disk may be full
        raise


def _writing(folder: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as error:
        raise _not_saved(folder, error) from error


def _not_saved(folder: Path, error: BaseException) -> NotSaved:
    why = (isinstance(error, OSError) and error.strerror) or str(error).split("\n", 1)[0]
    return NotSaved(
        f"--save {folder} cannot be written ({why})",
        fix="make room, or give a folder that this user may write to",
    )


def _first(failed: dcp.CheckpointException) -> BaseException:
    return failed.failures[min(failed.failures)][0]


def find(folder: Path, options: Options, world: World) -> Found:
    """The newest complete and undamaged checkpoint in `folder`, or `folder` itself; the same on all ranks. Collective.

    Raises BadCheckpoint if there is none, or if it was made by a job whose numbers this one cannot continue.
    """
    candidates = once(lambda: _candidates(folder))
    damaged: list[str] = []
    for candidate in candidates:
        looks = everyone(_look(candidate, options, world))
        for look in looks:
            if isinstance(look, LaunchError):
                raise look
        damage = next((look for look in looks if isinstance(look, str)), None)
        if damage is not None:
            damaged.append(f"{candidate}/{damage}")
            continue
        note = looks[0]
        assert isinstance(note, Note)
        if note.step > options.steps or (note.step == options.steps and not options.restarts):
            raise BadCheckpoint(
                f"--resume {candidate} has done {note.step} of {options.steps} steps already",
                fix=f"give --steps above {note.step}",
            )
        return Found(candidate, note, tuple(damaged))
    if damaged:
        raise BadCheckpoint(
            f"--resume {folder} is damaged: {'; '.join(damaged)}", fix="give another checkpoint"
        )
    raise BadCheckpoint(
        f"--resume {folder} has no complete checkpoint", fix="give the folder that --save wrote to"
    )


def _candidates(folder: Path) -> list[Path]:
    try:
        return [folder] if (folder / NOTE).is_file() else steps(folder)[::-1]
    except OSError as error:
        raise BadCheckpoint(
            f"--resume {folder} cannot be read ({error.strerror})", fix="make it readable"
        ) from error


def _look(candidate: Path, options: Options, world: World) -> Note | str | LaunchError:
    """Read a checkpoint's note and check this rank's share of the files. A text: what is damaged."""
    try:
        note = read_note(candidate)
        another = _another_job(candidate, note, options, world)
        if another is not None:
            return another
        check_files(candidate, note, world.rank, world.size)
    except Damaged as damage:
        return str(damage)
    return note


def _another_job(candidate: Path, note: Note, options: Options, world: World) -> BadCheckpoint | None:
    if note.ranks != world.size:
        return BadCheckpoint(
            f"--resume {candidate} was made with --nproc_per_node {note.ranks}, not {world.size}",
            fix="start as many: each rank has random numbers of its own",
        )
    for name, value in options.identity().items():
        made = note.options.get(name, value)  # an older run.json has fewer
        if made != value:
            return BadCheckpoint(
                f"--resume {candidate} was made with --{name.replace('_', '-')} {made}, not {value}",
                fix="give the same value",
            )
    return None


def refuse_overwriting(options: Options, found: Found | None) -> None:
    """Raise WouldOverwrite if the run would save over later steps of a run that it does not resume. Collective."""
    folder = options.save
    if folder is None or (found is not None and found.folder.parent.resolve() == folder.resolve()):
        return
    begins = 0 if found is None else found.step
    later = once(
        lambda: _writing(folder, lambda: [step.name for step in steps(folder) if number(step) > begins])
    )
    if later:
        raise WouldOverwrite(
            f"--save {folder} has {later[-1]} of another run, and this one begins at step {begins + 1}",
            fix=f"add --resume {folder} to go on from it, or give another folder",
        )


def load(found: Found, trainer: Trainer, world: World) -> None:
    """Bring `trainer` to where it stood when `found` was saved. Collective.

    Raises UnsafeCheckpoint or BadCheckpoint, on every rank, if it holds something else than this trainer's data.
    """
    stateful = _Stateful(trainer, world.rank)
    state = {"run": stateful.state_dict()}
    index = agree(lambda: _index(found))
    try:
        dcp.load(state, storage_reader=Reader(found.folder, index), planner=Planner())
    except dcp.CheckpointException as failed:
        raise _refused(found, _first(failed)) from None
    agree(lambda: _take(found, stateful, state["run"]))


def _index(found: Found) -> dcp.Metadata:
    try:
        return read_index(found.folder, found.note.files)
    except NotData as error:
        raise _refused(found, error) from error


def _take(found: Found, stateful: _Stateful, state: dict[str, Any]) -> None:
    try:
        stateful.load_state_dict(state)
    except RuntimeError as error:  # for example numbers that are no state of a generator
        raise _refused(found, error) from error


def _refused(found: Found, error: BaseException) -> LaunchError:
    why = str(error).split("\n", 1)[0]
    if isinstance(
        error, pickle.UnpicklingError
    ):  # of torch's, for a tensor; its text says how to read it all the same
        error = NotData(why := "a tensor in it is no plain data")
    if isinstance(error, NotData):
        return UnsafeCheckpoint(
            f"--resume {found.folder} is not read: {why}", fix="resume only what --save wrote"
        )
    return BadCheckpoint(
        f"--resume {found.folder} does not fit this job: {why}", fix="resume only what --save wrote"
    )
