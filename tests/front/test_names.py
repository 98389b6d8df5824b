"""The public names: what `import distckpt` loads, what `dir` shows, and what a type checker says of a user's file."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import distckpt_backends
import pytest

import distckpt as dc
from tests.processes import run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"}


def python(program: str) -> str:
    done = run([sys.executable, "-c", program], limit=120, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_type_checker_refuses_what_is_wrong_in_a_users_file_and_nothing_else() -> None:
    pytest.importorskip("pyright", reason="a dev requirement: pip install -e '.[dev]'")
    file = Path(__file__).with_name("user.py")
    marked = {n for n, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# error")}
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    texts = {d["range"]["start"]["line"] + 1: d["message"] for d in found if d["severity"] == "error"}
    assert set(texts) == marked, texts


def test_import_loads_no_torch_and_with_torch_nothing_of_ranks_or_the_command() -> None:
    program = """
import sys, distckpt
assert "torch" not in sys.modules and len([m for m in sys.modules if m.startswith("distckpt")]) == 1
import torch
distckpt.checkpoint, distckpt.rng.register, distckpt.compat.install
upper = [m for m in sys.modules if m.startswith(("distckpt.ranks", "distckpt.cli", "distckpt.integrations"))]
assert not upper, upper
distckpt.rng.stream, distckpt.Coordinator
assert "distckpt.ranks.rng_streams" in sys.modules
"""
    python(program)


def test_dir_shows_public_names_alone_and_each_of_them_is_there() -> None:
    assert not [name for name in dir(dc) if name.startswith("_")]
    assert set(dir(dc)) >= {
        "apply",
        "checkpoint",
        "errors",
        "Coordinator",
        "guard_units",
        "Session",
        "Applied",
    }
    assert set(dir(dc)) & {"importlib", "sys", "TYPE_CHECKING", "annotations", "engine", "ranks"} == set()
    for module in (dc, dc.rng):
        for name in dir(module):
            assert getattr(module, name) is not None
    assert set(python("from distckpt import *; print(*dir())").split()) >= set(dir(dc))


def test_what_a_type_checker_sees_is_what_there_is() -> None:
    for module in (dc, dc.rng):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        seen = {name.asname for node in imports for name in node.names} - {None}
        assert seen == set(dir(module))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    for module, name in ((dc, "chekpoint"), (dc, "MixedDeviceTypes"), (dc.rng, "steam")):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)


def test_every_coded_error_is_in_dc_errors_and_says_so() -> None:
    for package in (dc, distckpt_backends):
        for found in walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("errors"):
                import_module(found.name)
    known = {value for value in vars(dc.errors).values() if isinstance(value, type)}
    waiting, classes = [dc.DistckptError], set()
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith(("distckpt.", "distckpt_backends.")):
                classes.add(kind)
    assert len(classes) > 60
    assert classes - known == set()
    assert {kind.__module__ for kind in classes} == {"distckpt.errors", "distckpt_backends.errors"}


def test_a_code_stands_for_one_class_and_finds_it() -> None:
    coded = [kind for kind in vars(dc.errors).values() if getattr(kind, "code", "DC000") != "DC000"]
    assert all(dc.errors.by_code(kind.code) is kind for kind in coded)
    assert dc.errors.by_code("DC999") is dc.DistckptError
