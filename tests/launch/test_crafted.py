"""A checkpoint from somebody else is read as data: nothing in it runs, and the refusal is one coded line."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="launch/ needs the cli extra: pip install -e '.[cli]'")

from launch import state
from launch.app import BAD_INPUT, run
from launch.folder import NOTE, digest, read_note

# torch 2.9's own torch.distributed.checkpoint says this when it writes.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

SMALL = ["--layers", "1", "--width", "8", "--context", "8", "--ckpt", "none"]
LR = "run.optimizer.param_groups.bytes.weight.lr"


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("saved")
    assert run([*SMALL, "--steps", "2", "--save", str(where), "--save-every", "1"]) == 0
    return where


@pytest.fixture
def newest(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run")) / "step-000002"


def seal(step: Path) -> None:
    """Give a changed checkpoint a note that fits it, as whoever made it would."""
    note = read_note(step)
    (step / NOTE).write_text(replace(note, files={name: digest(step / name) for name in note.files}).text())


def refused(step: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run([*SMALL, "--steps", "3", "--resume", str(step.parent)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert str(step) in line
    return line


def save_with(monkeypatch: pytest.MonkeyPatch, where: Path, **changes: Any) -> Path:
    """A checkpoint made by the trainer itself, with other values under some names of the optimizer's or the rank's."""
    true = state._Stateful.state_dict

    def changed(self: state._Stateful) -> dict[str, Any]:
        said = true(self)
        for part, values in changes.items():
            said[part] = {**said[part], **values}
        return said

    with monkeypatch.context() as patched:
        patched.setattr(state._Stateful, "state_dict", changed)
        assert run([*SMALL, "--steps", "2", "--save", str(where)]) == 0
    return where / "step-000002"


def index(step: Path) -> Any:
    return pickle.loads((step / ".metadata").read_bytes())


def test_an_index_that_would_run_code_runs_nothing(
    newest: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
    seal(newest)
    line = refused(newest, capsys)
    assert f"[DC504] --resume {newest} is not read: .metadata names " in line
    assert not mark.exists()
    index(newest)
    assert mark.exists()  # the attack is one


def test_an_index_with_code_inside_a_true_one_runs_nothing(
    newest: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = index(newest)
    true.planner_data = Attack(mark)
    (newest / ".metadata").write_bytes(pickle.dumps(true))
    seal(newest)
    assert "[DC504]" in refused(newest, capsys)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "torch.float32.__class__"]
)
def test_an_index_names_nothing_but_what_an_index_is_made_of(
    name: str, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, attribute = name.partition(".") if name.startswith("torch.float32") else name.rpartition(".")
    code = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    code += b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93."
    (newest / ".metadata").write_bytes(code)
    seal(newest)
    assert f"[DC504] --resume {newest} is not read: .metadata names {name}" in refused(newest, capsys)


def test_a_value_that_would_run_code_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = LR.removeprefix("run.optimizer.")
    made = save_with(monkeypatch, tmp_path / "run", optimizer={lr: Attack(mark)})
    assert f"[DC504] --resume {made} is not read: {LR} is no plain data" in refused(made, capsys)
    assert not mark.exists()


def test_a_tensor_that_would_run_code_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = LR.removeprefix("run.optimizer.")
    made = save_with(monkeypatch, tmp_path / "run", optimizer={lr: Attack(mark)})
    true = index(made)
    attack = next(where for what, where in true.storage_data.items() if what.fqn == LR)
    for what in true.storage_data:
        if what.fqn == "run.model.head.weight":
            true.storage_data[what] = attack
    (made / ".metadata").write_bytes(pickle.dumps(true))
    seal(made)
    assert f"[DC504] --resume {made} is not read: " in refused(made, capsys)
    assert not mark.exists()


def test_an_index_does_not_lead_to_other_files(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    true = index(newest)
    for where in true.storage_data.values():
        where.relative_path = "../step-000001/__0_0.distcp"
    (newest / ".metadata").write_bytes(pickle.dumps(true))
    seal(newest)
    assert ".metadata leads to ../step-000001/__0_0.distcp" in refused(newest, capsys)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04N.", b"\x80\x04]\x94.", b"(" * 9, b"\x80\x04\x8c\x05torch\x8c\x04Size\x93."]
)
def test_an_index_that_is_none_is_one_coded_line(
    data: bytes, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest / ".metadata").write_bytes(data)
    seal(newest)
    assert ".metadata is no index" in refused(newest, capsys)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"optimizer": {LR.removeprefix("run.optimizer."): "much"}}, "DC504", "is of type str, not float"),
        ({"rank0": {"rng": torch.zeros(5056, dtype=torch.uint8)}}, "DC503", "does not fit this job"),
        ({"rank0": {"data": torch.zeros(3, dtype=torch.uint8)}}, "DC503", "does not fit this job"),
        ({"rank0": {"data": 7}}, "DC504", "is of type int, not Tensor"),
        ({"model": {"head.weight": torch.zeros(3)}}, "DC503", "does not fit this job"),
    ],
)
def test_values_that_are_not_this_jobs_are_one_coded_line(
    changes: dict[str, Any],
    code: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = save_with(monkeypatch, tmp_path / "run", **changes)
    line = refused(made, capsys)
    assert f"[{code}]" in line
    assert words in line
