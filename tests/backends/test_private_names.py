"""Private names of torch: one table per room, one sentence for each that is missing, one warning for a newer torch."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distckpt_backends import private
from distckpt_backends.errors import UnsupportedTorch

from .lacking import ROOMS

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "PATH": "/usr/bin:/bin", "HF_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def tables() -> dict[str, dict[str, tuple[str, ...]]]:
    return {room: importlib.import_module(room).NAMES.table for room in ROOMS}


def test_this_torch_has_every_name_of_every_table() -> None:
    for room in ROOMS:
        names = importlib.import_module(room).NAMES
        assert {feature: names.missing(feature) for feature in names.table} == dict.fromkeys(names.table, ())


def test_a_torch_that_lacks_one_name_is_refused_in_one_sentence_that_names_it() -> None:
    done = run("import runpy; runpy.run_module('tests.backends.lacking', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    said: dict[str, str | None] = json.loads(done.stdout)
    assert set(said) == {name for table in tables().values() for names in table.values() for name in names}
    for name, text in said.items():
        if text is not None:
            written = name.replace(":", ".").replace("|", " or ")
            first = text.partition("\n")[0]
            assert first.startswith(f"UnsupportedTorch: [DC208] torch {torch.__version__} has no "), name
            assert written in first, (name, text)
            assert "distckpt was tried on torch 2.9 to 2.15" in text
    # Those of C++ classes, and those that instances get in a method: no more than a few, so most were tried.
    assert sum(text is None for text in said.values()) <= 12, [n for n, t in said.items() if t is None]


@pytest.mark.parametrize(
    ("name", "gone", "test"),
    [
        ("torch._C._autograd._pop_saved_tensors_default_hooks", "regions", "left out"),
        ("torch._C._get_privateuse1_backend_name", "devices", "left out"),
        ("torch.distributed.fsdp._fully_shard._fsdp_state._get_module_fsdp_state", "FSDP2 units", "bitwise"),
    ],
)
def test_the_doctor_runs_and_says_what_is_missing(name: str, gone: str, test: str) -> None:
    done = run(
        "import importlib, sys\n"
        "owner, name = sys.argv[1].rsplit('.', 1)\n"
        "delattr(importlib.import_module(owner), name)\n"
        "from distckpt.cli.main import main\n"
        "sys.exit(main(['doctor', '--json']))",
        name,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = [f for f in report["findings"]["torch"] if f["status"] == "fail"]
    assert {f["code"] for f in found} == {
        "DC208"
    }  # torch itself may use the name in a module that it then lacks
    assert f"has no {name}" in found[0]["text"]
    assert (report["devices"] == []) is (gone == "devices")
    assert [f["subject"] for f in report["findings"]["self_test"]] == [test]
    assert report["findings"]["neighbours"]


def test_a_torch_newer_than_the_newest_tried_is_one_warning_and_a_line_of_the_doctor() -> None:
    newer = "import torch, sys\ntorch.__version__ = torch.torch_version.TorchVersion('2.99.0')\n"
    done = run(
        newer
        + "import distckpt as dc, distckpt.ranks, distckpt._torch_dist\n"
        + "dc.checkpoint(torch.sin, torch.ones(2, requires_grad=True)).sum().backward()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning") == 1
    assert "torch 2.99.0 is newer than 2.15, the newest that distckpt was tried on" in done.stderr
    done = run(newer + "from distckpt.cli.main import main\nsys.exit(main(['doctor', '--no-self-test']))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  warn  version" in done.stdout
    assert "torch 2.99.0 is newer than" in done.stdout


def test_the_newest_torch_tried_is_the_one_that_the_suites_install() -> None:
    newest = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements-newest.txt").read_text(), re.M)
    assert newest is not None
    assert tuple(map(int, newest.groups())) == private.NEWEST


class Unit:
    def __init__(self) -> None:
        self._state = 1

    def put(self, other: Any) -> None:
        other._elsewhere = self._missing


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("Unit._state", False),
        ("Unit._gone|_state", False),
        ("Unit._state|_gone", False),
        ("Unit._missing", True),
        ("Unit._gone|_too", True),
        ("Unit.put._gone", True),
    ],
)
def test_an_attribute_that_instances_get_in_a_method_counts_and_one_that_is_only_read_does_not(
    path: str, missing: bool
) -> None:
    sys.modules["tests_private_unit"] = sys.modules[__name__]
    try:
        names = private.PrivateNames({"this": (f"tests_private_unit:{path}",)})
        if not missing:
            names.need("this")
            return
        with pytest.raises(UnsupportedTorch, match="DC208"):
            names.need("this")
    finally:
        del sys.modules["tests_private_unit"]


# Of an object that no class of torch's declares, or of torch_xla, which is one version.
_NOT_OF_A_CLASS = {
    "distckpt_backends._torch": {
        "_cdata",  # of a generator, and asked for with care
        "_current_frames",  # Python's
        "_XLAC",
        "_xla_get_default_device",
        "_xla_get_rng_seed",
        "_xla_runtime_is_initialized",
        "_xla_set_rng_seed",
        "_xla_step_marker",
    },
    "distckpt._torch": {
        "_higher_order_ops",  # in a try: not in every version
        "_resolve_inductor_callable",
        "_c10d_functional",  # a namespace of operators
        "_out",  # ours
        "_sequence_nr",  # of an autograd node: every operator has a class of its own
        "_torchdynamo_disable",  # set, not read
    },
    "distckpt._torch_dist": {
        "_get_registry",  # in the table of distckpt._torch
        "_device_handle",  # of an FSDP1 unit, set by a function
        "_handle",
        "_pre_unshard_stream",
        "_unshard_stream",
    },
}


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_uses_of_torchs_private_names_stands_in_its_table(room: str) -> None:
    path = importlib.import_module(room).__file__
    assert path is not None
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    listed = {
        part for names in tables()[room].values() for name in names for part in re.split(r"[.:|]", name)
    }
    private_names = {name for name in used if re.match("_[^_]", name)}
    assert private_names - own - listed - _NOT_OF_A_CLASS[room] == set()


def test_no_other_room_uses_private_names_of_torch() -> None:
    named = re.compile(r"\btorch(?:\.\w+)*\._(?!_)\w+|^ *from torch[\w.]* import .*(?<!as )\b_[a-z]", re.M)
    shared = re.compile(
        r"torch\.utils\._(?:pytree|python_dispatch)|torch\.(?:_ops|ops)\b"
    )  # in the table of distckpt._torch
    for top in ("distckpt", "backends"):
        for path in (ROOT / top).rglob("*.py"):
            if path.name in ("_torch.py", "_torch_dist.py", "private.py", "install.py"):
                continue
            code = re.sub(r'"""[\s\S]*?"""|"torch[^"]*"|#.*', "", path.read_text())
            found = [m.group() for m in named.finditer(code) if not shared.search(m.group())]
            assert not found, (path, found)
