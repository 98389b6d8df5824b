"""``distckpt run``: the script is what it would be under Python, but for whose regions it gets."""

from __future__ import annotations

import json
import os
import py_compile
import zipfile
from pathlib import Path

import pytest

from distckpt.cli.main import main

from .process import distckpt, python, torchrun
from .test_doctor import validate

LOOK = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": globals().get("__file__"), "path": sys.path[0],
    "main": sys.modules["__main__"].__dict__ is globals(), "package": __package__,
    "spec": getattr(__spec__, "name", None), "builtins": type(__builtins__).__name__,
    "dynamo": "torch._dynamo" in sys.modules,  # loading it takes longer than torch
}))
"""
TRAIN = """
import os, sys
import torch
from torch.utils.checkpoint import checkpoint

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return torch.nn.functional.dropout(torch.tanh(self.linear(x)), 0.5)

torch.manual_seed(0)
blocks = torch.nn.ModuleList(Block() for _ in range(3))
x = torch.ones(4, 8, requires_grad=True)
for block in blocks:
    x = checkpoint(block, x, use_reentrant="reentrant" in sys.argv)
x.sum().backward()
print(checkpoint.__module__, *(float(p.grad.sum()) for p in blocks[2].parameters()))
if "raise" in sys.argv: raise ValueError("in the script")
"""
ENDS = """
import sys
def fail(): raise ValueError("in the script")
{"exit": lambda: sys.exit(7), "words": lambda: sys.exit("not today"), "raise": fail}[sys.argv[1]]()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "ends.py").write_text(ENDS)
    (tmp_path / "pkg").mkdir()
    for name in ("look.py", "pkg/__main__.py", "pkg/__init__.py", "pkg/look.py"):
        (tmp_path / name).write_text("" if name.endswith("__init__.py") else LOOK)
    return tmp_path


@pytest.mark.parametrize(
    "script",
    [["pkg/look.py"], ["pkg"], ["look.zip"], ["look.pyc"], ["-m", "pkg"], ["-m", "pkg.look"]],
    ids=" ".join,
)
def test_argv_main_and_path_are_as_python_makes_them(folder: Path, script: list[str]) -> None:
    with zipfile.ZipFile(folder / "look.zip", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    py_compile.compile(os.fspath(folder / "look.py"), os.fspath(folder / "look.pyc"))
    theirs = python(*script, "a", "--b", cwd=folder)
    ours = distckpt("run", *script, "a", "--b", cwd=folder)
    assert theirs.returncode == ours.returncode == 0, ours.stderr
    expected, found = json.loads(theirs.stdout), json.loads(ours.stdout)
    same = set(expected)
    if script[0] == "-m":
        same.remove("builtins")  # runpy leaves the dictionary there, Python the module; both work
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


def test_the_scripts_regions_are_ours_and_its_gradients_the_same(folder: Path) -> None:
    theirs = python("train.py", cwd=folder)
    ours = distckpt("run", "--json", "r.json", "train.py", cwd=folder)
    assert ours.returncode == 0, ours.stderr
    assert theirs.stdout.split()[0] == "torch.utils.checkpoint"
    assert ours.stdout.split()[0] == "distckpt.compat.checkpoint"
    assert ours.stdout.split()[1:] == theirs.stdout.split()[1:]
    first, second = ours.stderr.splitlines()
    assert first.startswith("distckpt run: 15 names of torch.utils.checkpoint are distckpt's in this process")
    # three inputs of 4 x 8 floats
    assert second == "distckpt run: 3 regions ran, 3 replays, at most 384 B of region inputs kept at once"
    found = json.loads((folder / "r.json").read_text())
    validate(found, "run")
    assert (found["regions"], found["replays"], found["kept"], found["lost"]) == (3, 3, 384, [])
    assert "torch.utils.checkpoint.checkpoint" in found["replaced"]


@pytest.mark.parametrize(("argument", "code"), [("exit", 7), ("words", 1), ("raise", 1)])
def test_exit_codes_and_exceptions_pass_through(folder: Path, argument: str, code: int) -> None:
    theirs = python("ends.py", argument, cwd=folder)
    ours = distckpt("run", "--quiet", "ends.py", argument, cwd=folder)
    assert theirs.returncode == ours.returncode == code
    assert ours.stderr == theirs.stderr  # the traceback too begins in the script


def test_counts_are_said_after_an_exception_too(folder: Path) -> None:
    done = distckpt("run", "train.py", "raise", "reentrant", cwd=folder)
    assert "3 regions ran, 3 replays" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: in the script")


def test_under_torchrun_every_rank_runs_it_and_rank_0_speaks(folder: Path) -> None:
    done = torchrun("-m", "distckpt", "run", "--json", "r.json", "train.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distckpt.compat.checkpoint") == 2
    assert done.stderr.count("regions ran") == 1
    assert "rank 0 of 2: 3 regions ran" in done.stderr
    for rank in range(2):
        found = json.loads((folder / f"r.rank{rank}.json").read_text())
        validate(found, "run")
        assert (found["rank"], found["ranks"], found["regions"]) == (rank, 2, 3)


def test_a_script_without_regions_is_told_so(folder: Path) -> None:
    done = distckpt("run", "look.py", cwd=folder)
    assert "no region ran in this process" in done.stderr
    assert done.stderr.splitlines()[-1] == "distckpt run: Next: distckpt doctor"


def test_a_name_that_the_script_rebinds_is_said(folder: Path) -> None:
    (folder / "look.py").write_text(
        "import torch.utils.checkpoint as c\nc.checkpoint = lambda *a, **k: None\n"
    )
    done = distckpt("run", "look.py", cwd=folder)
    assert "replaced by somebody else meanwhile: torch.utils.checkpoint.checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trai.py"], "there is no script trai.py: did you mean train.py?"),
        (["nowhere/x.py"], "there is no script nowhere/x.py: give the path of a Python file, or -m MODULE"),
        (["empty"], "the folder empty has no __main__.py: name the script in it"),
        (["-m", "no_such"], "there is no module no_such: check the name"),
        (["-m", "no.such"], "there is no module no.such"),
        (["-m", "emptypkg"], "the package emptypkg has no __main__: name the module in it that is to run"),
    ],
)
def test_a_script_that_does_not_exist_is_one_line_and_exit_code_2(
    folder: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "empty").mkdir()
    (folder / "emptypkg").mkdir()
    (folder / "emptypkg" / "__init__.py").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [os.fspath(folder), *__import__("sys").path])
    assert main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("distckpt: [DC702] ")
    assert words in err
