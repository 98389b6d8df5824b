"""A checkpoint is complete and as it was saved, or it is not used: damage, later steps, and what cannot be written."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="launch/ needs the cli extra: pip install -e '.[cli]'")

from launch import data, folder, loop, state
from launch.app import BAD_INPUT, run
from launch.folder import NOTE, Damaged, read_note
from launch.options import Options
from launch.parallel import joined
from launch.report import Report
from tests.launch.job import cells, forked

# torch 2.9's own torch.distributed.checkpoint says this when it writes.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

SMALL = ["--layers", "1", "--width", "8", "--context", "8", "--ckpt", "none"]
JOB: dict[str, Any] = {"layers": 1, "width": 8, "context": 8, "ckpt": "none"}
SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints."""
    where = tmp_path_factory.mktemp("saved")
    assert run([*SMALL, "--steps", "4", "--save", str(where), "--save-every", "2"]) == 0
    return where


@pytest.fixture(scope="module")
def whole() -> str:
    """The parameters after six steps that nothing disturbed."""
    with joined() as world:
        trainer = loop.train(Options(**JOB, steps=6), data.read(None, 8), world, Report(quiet=True))
        return trainer.digest()["parameters"]


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(file: Path, at: int = -1) -> None:
    held = bytearray(file.read_bytes())
    held[len(held) // 2 if at < 0 else at] ^= 1
    file.write_bytes(held)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def swap(file: Path) -> None:
    """The file of another step, whole."""
    shutil.copyfile(file.parents[1] / "step-000002" / file.name, file)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    *((damage, name) for damage in (flip, cut, Path.unlink) for name in (SHARD, ".metadata")),
    (swap, SHARD),
    (flip, NOTE),
    (cut, NOTE),
    (lambda file: file.write_text("[1]"), NOTE),
    (lambda file: file.write_text("{}"), NOTE),
    (lambda file: file.write_bytes(b""), NOTE),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_goes_on_to_the_same_bits(
    damage: Callable[[Path], object], name: str, place: Path, whole: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = place / "step-000004"
    damage(newest / name)
    assert run([*SMALL, "--steps", "6", "--resume", str(place), "--save", str(place)]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"launch/train.py: [DC503] left out, damaged: {newest}/{name} ")
    assert f"resumed {place}/step-000002 after 2 steps" in said.out
    assert cells(said.out, "last parameters") == [whole]
    assert sorted(p.name for p in folder.steps(place)) == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_one_coded_line(
    damage: Callable[[Path], object], name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = place / "step-000004"
    damage(asked / name)
    assert run([*SMALL, "--steps", "6", "--resume", str(asked)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"launch/train.py: [DC503] --resume {asked} is damaged: {asked}/{name} ")


def test_a_folder_without_an_undamaged_checkpoint_is_one_coded_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in folder.steps(place):
        flip(step / SHARD)
    assert run([*SMALL, "--steps", "6", "--resume", str(place)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "[DC503]" in line
    assert f"{place}/step-000004/{SHARD} " in line
    assert f"{place}/step-000002/{SHARD} " in line


def test_every_byte_of_the_note_and_many_of_each_file_are_looked_at(place: Path) -> None:
    options = Options(**JOB, steps=6)
    newest = place / "step-000004"
    with joined() as world:
        assert state.find(place, options, world).folder == newest
        for file in sorted(newest.iterdir()):
            size = file.stat().st_size
            for at in range(0, size, 1 if file.name == NOTE else max(1, size // 60)):
                flip(file, at)
                found = state.find(place, options, world)
                assert found.folder == place / "step-000002", (file.name, at)
                assert found.damaged[0].startswith(str(newest)), (file.name, at)
                flip(file, at)
        assert state.find(place, options, world).folder == newest


def test_a_note_that_leads_out_of_its_folder_is_damaged(place: Path) -> None:
    note = read_note(place / "step-000004")
    note.files["../step-000002/__0_0.distcp"] = "0"
    (place / "step-000004" / NOTE).write_text(note.text())
    with pytest.raises(Damaged, match="is not what was saved"):
        read_note(place / "step-000004")


def test_a_run_does_not_save_over_later_steps_of_another(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    other = tmp_path / "other"
    assert run([*SMALL, "--steps", "2", "--save", str(other)]) == 0
    capsys.readouterr()
    for resume, begins in (([], 1), (["--resume", str(other)], 3)):
        assert run([*SMALL, "--steps", "6", "--save", str(place), *resume]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"launch/train.py: [DC505] --save {place} has step-000004 of another run, and this one begins at step "
            f"{begins}: add --resume {place} to go on from it, or give another folder"
        )
    assert before == {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def test_a_run_saves_over_later_steps_of_the_run_that_it_resumes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(place)
    newest = place / "step-000004"
    before = newest.stat().st_ino
    resume = ["--resume", str(tmp_path / "link" / "step-000002"), "--save", str(place)]
    assert run([*SMALL, "--steps", "4", *resume]) == 0
    assert newest.stat().st_ino != before
    assert sorted(entry.name for entry in place.iterdir()) == ["step-000002", "step-000004"]


def test_a_job_that_is_started_again_after_its_last_step_has_nothing_left_to_do(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--steps", "4", "--save", str(place), "--resume", str(place)]) == 0
    assert "has done all 4 steps: nothing is left to do" in capsys.readouterr().out


def test_files_and_names_are_on_the_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    sync, rename = os.fsync, Path.rename
    hidden = re.compile(r"\.step-\w+\.part")

    def note_sync(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink().relative_to(tmp_path)
        did.append(f"sync {hidden.sub('PART', str(path))}")
        sync(file)

    def note_rename(self: Path, target: Path) -> Path:
        did.append(f"rename {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    if not Path("/proc/self/fd").exists():
        pytest.skip("reads which file is synced in /proc")
    assert run([*SMALL, "--steps", "1", "--save", str(tmp_path / "run")]) == 0
    assert did == [
        f"sync run/PART/{SHARD}",
        "sync run/PART/.metadata.tmp",
        "rename .metadata",
        f"sync run/PART/{NOTE}",
        "sync run/PART",
        "rename step-000001",
        "sync run",
    ]


def test_a_checkpoint_that_cannot_be_written_is_one_coded_line_and_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        code = run([*SMALL, "--steps", "1", "--save", str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"launch/train.py: [DC506] --save {tmp_path / 'run'} cannot be written (")
    assert "make room" in line
    assert list((tmp_path / "run").iterdir()) == []


def test_two_ranks_choose_the_same_step_when_one_of_them_sees_the_damage(tmp_path: Path) -> None:
    where = tmp_path / "run"
    whole = forked("--steps", 4, "--save", where, "--save-every", 1)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    names = sorted(read_note(where / "step-000004").files)
    flip(where / "step-000004" / names[1])  # the second rank's share of the files
    flip(where / "step-000003" / names[0])  # the first's
    done = forked("--steps", 4, "--resume", where, "--save", where)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("launch/train.py: ")]
    assert [line.split("damaged: ")[1] for line in said] == [
        f"{where}/step-000004/{names[1]} is not what was saved",
        f"{where}/step-000003/{names[0]} is not what was saved",
    ]
    assert f"resumed {where}/step-000002 after 2 steps" in done.stdout
    assert cells(done.stdout, "last parameters") == cells(whole.stdout, "last parameters")
