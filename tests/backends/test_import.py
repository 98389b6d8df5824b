"""Importing and asking around loads no device package and starts no device runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import sys
import torch
before = set(sys.modules)
import {package}
import distckpt_backends
new = set(sys.modules) - before
for name in ("torch_xla", "torch_tpu", "numpy"):
    assert name not in new, name
files = {{"cuda", "mps", "xla", "tpu", "generator", "module"}}
loaded = {{n.rpartition(".")[2] for n in new if n.startswith("distckpt_backends.")}} & files
assert not loaded, loaded

assert distckpt_backends.live() == ()
for kind in ("cpu", "cuda", "mps", "xla", "tpu"):
    backend = distckpt_backends.get(kind)
    backend.is_initialized(), backend.live_devices(), repr(backend)
    if kind != "xla":  # knowing whether torch_xla works takes importing it
        backend.why_unavailable(), backend.device_count()
distckpt_backends.live(), distckpt_backends.known_types()
assert "torch_xla" not in sys.modules
assert not torch.cuda.is_initialized()
assert distckpt_backends.live() == ()
"""

XLA = """
import torch_xla
import distckpt_backends
backend = distckpt_backends.get("xla")
assert backend.is_available()
assert backend.device_count() == 0 and backend.live_devices() == () and distckpt_backends.live() == ()
assert backend.capabilities.deferred
assert not torch_xla._XLAC._xla_runtime_is_initialized()
"""


def run(source: str) -> None:
    search = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", source]
    done = processes.run(command, limit=120, environment={**os.environ, "PYTHONPATH": search})
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_backends_loads_no_device_file() -> None:
    run(CHECK.format(package="distckpt_backends"))


def test_importing_distckpt_loads_no_device_file() -> None:
    run(CHECK.format(package="distckpt"))


@pytest.mark.xla
def test_asking_about_xla_does_not_start_its_runtime() -> None:
    pytest.importorskip("torch_xla", reason="torch_xla is not installed", exc_type=ImportError)
    run(XLA)
