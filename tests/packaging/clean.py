"""Clean virtual environments without a network: what a project needs is linked in from this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def closure(names: Iterable[str]) -> list[Distribution]:
    """The distributions of these names and all that they require here."""
    found: dict[str, Distribution] = {}
    followed: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        asked = waiting.pop()
        name = asked.name.lower()
        try:
            there = found[name] = found.get(name) or distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        for extra in {"", *asked.extras} - {extra for seen, extra in followed if seen == name}:
            followed.add((name, extra))
            needs = map(Requirement, there.requires or [])
            waiting += [n for n in needs if n.marker is None or n.marker.evaluate({"extra": extra})]
    return list(found.values())


def link(site: Path, names: Iterable[str]) -> None:
    """Make the named distributions, and what they need, importable from a folder, metadata included. What a new
    environment has already (an old setuptools) is replaced, as an index would."""
    site.mkdir(parents=True, exist_ok=True)
    for found in closure(names):
        for old in site.glob(f"{found.name}-*.dist-info"):
            if not old.is_symlink():
                shutil.rmtree(old)
        tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            source, target = Path(str(found.locate_file(top))), site / top
            if not source.exists():
                continue
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            if not target.exists():
                target.symlink_to(source)


def environment(folder: Path, names: Iterable[str]) -> Path:
    """A new virtual environment without pip, with the named distributions; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    link(folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages", names)
    return python


def run(*command: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command with nothing of ours in its environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **changes},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def install(python: Path, *what: object) -> subprocess.CompletedProcess[str]:
    """pip install, offline, into the environment of ``python``."""
    quiet = ("--disable-pip-version-check", "--no-input", "--no-index", "--no-build-isolation")
    return run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what)
