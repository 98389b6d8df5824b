"""The Makefile's environments: a Python that is too old, pip that fails, and pins that every Python can take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.processes import run

from .clean import ROOT

packaging = pytest.importorskip("packaging.requirements", reason="comes with pytest")
SUPPORTED = ("3.10.0", "3.11.2", "3.11.7", "3.12.1", "3.13.0")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "constraints-dev.txt", "requirements-newest.txt"):
        shutil.copy(ROOT / name, folder)
    # a make of its own, also where the tests themselves run under make
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return run(["make", "-s", *words], limit=60, environment=outer, cwd=folder)


def stand_in(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old_is_one_sentence_before_anything_is_made(tmp_path: Path) -> None:
    # its version is what the check sees; nothing else of it is used
    old = f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); $2"'
    done = make(tmp_path, f"PYTHON={stand_in(tmp_path / 'python3.9', old)}", "demo")
    assert done.returncode != 0
    said, stopped = done.stderr.strip().splitlines()
    assert re.match(r"distckpt needs Python 3\.10 or later; \S+ is 3\.9\.18: make PYTHON=", said)
    assert stopped.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()


def test_what_pip_says_is_shown_when_it_fails_and_what_goes_on_before_it_starts(tmp_path: Path) -> None:
    stand_in(tmp_path / ".venv" / "bin" / "pip", "")
    stand_in(tmp_path / ".venv" / "bin" / "python", "echo The conflict is caused by: a pin; exit 1")
    done = make(tmp_path, f"PYTHON={sys.executable}", "demo")
    assert done.returncode != 0
    first, *rest = done.stdout.splitlines()
    assert first.startswith("installing what the demo needs into .venv: minutes the first time")
    assert "The conflict is caused by: a pin" in rest
    assert not (tmp_path / ".venv" / ".demo").exists()


def test_every_python_can_take_the_pins_that_are_meant_for_it() -> None:
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    needs = {
        canonicalize_name(d.metadata["Name"]): d.metadata.get("Requires-Python") for d in distributions()
    }
    text = re.sub(r"#.*", "", (ROOT / "constraints-dev.txt").read_text())
    pins = [packaging.Requirement(line) for line in text.split("\n") if line.strip()]
    assert len(pins) > 60
    for pin in pins:
        required = SpecifierSet(needs.get(canonicalize_name(pin.name)) or "")
        for version in SUPPORTED:
            minor = version.rpartition(".")[0]
            if pin.marker is None or pin.marker.evaluate(
                {"python_version": minor, "python_full_version": version}
            ):
                assert version in required, f"{pin} needs {required}: give it a marker for {version}"


def test_the_demo_needs_no_tool_of_the_docs_or_the_tests() -> None:
    recipe = subprocess.run(
        ["make", "-n", "demo", "VENV=elsewhere"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-e '.[cli]'" in recipe.stdout
    assert not re.search(r"\[(dev|docs)\]", recipe.stdout)
