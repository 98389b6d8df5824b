"""A checkpoint as a folder: the note in it says what it is of and what its files hold, so that damage is noticed.

Note [A checkpoint is complete or not there]
    Files are written into a hidden folder, whose name no other save has. When all of them are on the disk, the note
    `run.json` with their digests follows, and only then is the folder renamed to `step-NNNNNN`. A save that is killed
    leaves a hidden folder, which the next save takes away. A step that is there already is moved aside in the moment
    before the rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

NOTE = "run.json"
_PIECE = 2**20


class Damaged(Exception):
    """A folder does not hold what was saved into it; the text says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Note:
    """What a checkpoint is of. ``files`` are the SHA-256 digests of all its files but the note, by name."""

    step: int
    ranks: int
    options: dict[str, str]
    files: dict[str, str]

    def text(self) -> str:
        """As in `run.json`, with a digest of its own."""
        return json.dumps({**asdict(self), "digest": _seal(asdict(self))}, indent=2) + "\n"


def read_note(folder: Path) -> Note:
    """The note of a checkpoint. One without digests, from elsewhere, has no ``files``.

    Raises:
        Damaged: it is cut, changed or missing.
    """
    try:
        said = json.loads((folder / NOTE).read_bytes())
        seal = said.pop("digest", None)
        note = Note(said["step"], said["ranks"], said["options"], said.get("files", {}))
        sound = seal == _seal(said) if seal is not None else "files" not in said
    except OSError as error:
        raise Damaged(f"{NOTE} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{NOTE} is cut or is no note") from error
    if not (sound and _well_typed(note)):
        raise Damaged(f"{NOTE} is not what was saved")
    return note


def _seal(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _well_typed(note: Note) -> bool:
    maps = isinstance(note.options, dict) and isinstance(note.files, dict)
    # A name with a folder in it would lead out of this one.
    return (
        maps
        and all(type(n) is int for n in (note.step, note.ranks))
        and all(Path(f).name == f for f in note.files)
    )


def check_files(folder: Path, note: Note, share: int, of: int) -> None:
    """Compare files with the note: every ``of``-th one, from number ``share`` on.

    Raises:
        Damaged: a file is missing or has other bytes.
    """
    if not note.files:
        raise Damaged(f"{NOTE} lists no digests")
    for name in sorted(note.files)[share::of]:
        try:
            if not (folder / name).is_file():  # a pipe would be waited for
                raise Damaged(f"{name} is missing")
            found = digest(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if found != note.files[name]:
            raise Damaged(f"{name} is not what was saved")


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    return sorted(
        (note.parent for note in folder.glob(f"step-*/{NOTE}")), key=lambda step: (number(step), step)
    )


def number(step: Path) -> int:
    """The steps that a checkpoint's name says it has; -1 if it says something else."""
    digits = step.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def begin(folder: Path) -> Path:
    """A new hidden folder in ``folder``, to write into; what killed saves have left there is taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    # Of its own, so that a rank that a restart has left behind never writes into its successor's.
    part = folder / f".step-{uuid.uuid4().hex[:12]}.part"
    part.mkdir()
    return part


def publish(part: Path, note: Note) -> Path:
    """Give a folder, whose files are all written, its note and its name; returns it under that name."""
    with (part / NOTE).open("w") as opened:
        opened.write(note.text())
        opened.flush()
        os.fsync(opened.fileno())
    _sync(part)
    target = part.parent / f"step-{note.step:06d}"
    aside = part.with_suffix(".old")
    if target.exists():
        target.rename(aside)
    part.rename(target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return target


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)  # of a folder: its names
    finally:
        os.close(opened)
