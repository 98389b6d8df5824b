"""The wheel: what is in it, and that it works where nothing of the checkout is."""

from __future__ import annotations

import configparser
import json
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from .clean import ROOT, environment, install, run

pytest.importorskip("hatchling", reason="a dev requirement: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sys

    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with torch and the wheel, and no extra."""
    python = environment(tmp_path_factory.mktemp("clean") / "env", ["torch", "numpy"])
    done = install(python, wheel)
    assert done.returncode == 0, done.stderr
    return python


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (full,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(full).decode()


def test_it_holds_both_packages_whole_and_nothing_else(wheel: Path) -> None:
    sources = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "distckpt"), (ROOT / "backends", "distckpt_backends"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names(wheel) if ".dist-info/" not in name} == sources


def test_it_is_typed_and_brings_the_json_schemas(wheel: Path) -> None:
    assert {"distckpt/py.typed", "distckpt_backends/py.typed"} <= names(wheel)
    assert {"distckpt/cli/doctor.schema.json", "distckpt/cli/run.schema.json"} <= names(wheel)


def test_launch_and_tests_are_not_packaged(wheel: Path) -> None:
    assert {name.split("/")[0].split("-")[0] for name in names(wheel)} == {"distckpt", "distckpt_backends"}


def test_it_needs_torch_only(wheel: Path) -> None:
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    needs = metadata.get_all("Requires-Dist") or []
    assert [need for need in needs if "extra ==" not in need] == ["torch>=2.9"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"cli", "hf", "xla"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    points = configparser.ConfigParser()
    points.read_string(read(wheel, "entry_points.txt"))
    assert dict(points["console_scripts"]) == {"distckpt": "distckpt.cli.main:main"}


def test_the_installed_command_works_without_any_extra(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "distckpt"
    assert run(command, "--version", cwd=tmp_path).stdout == "distckpt 0.1.0\n"
    done = run(command, "doctor", "--json", "--device", "cpu", cwd=tmp_path, RANK="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_the_installed_command_runs_a_script(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys, torch, distckpt, distckpt_backends, torch.utils.checkpoint as c\n"
        "assert 'site-packages' in distckpt.__file__ and 'site-packages' in distckpt_backends.__file__\n"
        f"assert sys.path[0] == {str(tmp_path)!r}, sys.path\n"
        "c.checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()\n"
    )
    done = run(installed.parent / "distckpt", "run", tmp_path / "train.py")
    assert done.returncode == 0, done.stderr
    assert "1 regions ran, 1 replays" in done.stderr


def test_a_checkout_installs_too(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", ["torch", "numpy", "hatchling"])
    done = install(python, "--no-deps", ROOT)
    assert done.returncode == 0, done.stderr
    done = run(python, "-c", "import distckpt, distckpt.cli.main; print(distckpt.__file__)", cwd=tmp_path)
    assert str(tmp_path) in done.stdout, done.stderr


OTHERS = [
    python
    for minor in (10, 11, 12, 13)
    for python in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))[-1:]
]


@pytest.mark.skipif(not OTHERS, reason="no other interpreters here (looked in ~/.pyenv/versions)")
@pytest.mark.parametrize("python", OTHERS, ids=lambda python: python.parts[-3])
def test_every_python_that_is_supported_compiles_it_and_gives_help(
    python: Path, wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = run(python, "-W", "error", "-m", "compileall", "-q", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(
        python, "-m", "distckpt", "doctor", "--help", cwd=tmp_path
    )  # imports no torch, so it needs none
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: distckpt doctor")
