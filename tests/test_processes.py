"""What tests start ends with them, is given time on a busy machine, and is heard when they fail."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.processes import ROOT, Late, Limit, Process, family, run, started

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

# A child in a session of its own and out of its parent's hands, as torchrun's ranks are when their agent is lost.
TREE = """
import subprocess, sys, time
child = "import time; print('child', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
print("parent", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


def tree(seconds: float, code: int = 0) -> list[object]:
    return [sys.executable, "-c", TREE, seconds, code]


def wait_for_child(process: Process) -> None:
    while "child" not in process.printed():
        time.sleep(0.05)
    assert len(family(process.token)) >= 1


def test_a_process_that_is_late_says_what_it_printed_and_leaves_no_child() -> None:
    with pytest.raises(Late, match="parent"), started(tree(600)) as process:
        wait_for_child(process)
        process.within(0.0)
    assert family(process.token) == []


def test_a_failing_test_leaves_no_child() -> None:
    with pytest.raises(ZeroDivisionError), started(tree(600)) as process:
        wait_for_child(process)
        raise ZeroDivisionError
    assert family(process.token) == []


def test_a_process_that_ends_with_an_error_leaves_no_child() -> None:
    with started(tree(0, code=3)) as process:
        assert process.within(60) == 3
        wait_for_child(process)
    assert family(process.token) == []


def test_a_limit_is_longer_by_the_load_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now, load = 100.0, 1.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    limit = Limit(10)
    now += 9
    assert not limit.over()
    load = 8.0  # four times as much as the cores can do
    now += 3.9
    assert not limit.over()
    now += 0.2
    assert limit.over()


def test_a_failing_test_shows_what_its_processes_printed_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\nfrom tests.processes import run\n"
        "def test_fails():\n    run([sys.executable, '-c', 'print(6 * 7)'], limit=60)\n    assert 0\n"
        "def test_passes():\n    run([sys.executable, '-c', 'print(6 * 8)'], limit=60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        tmp_path,
    ]
    done = run(command, limit=120, environment=environment, cwd=tmp_path)
    assert "what its processes printed" in done.stdout
    (kept,) = tmp_path.glob("distckpt-test-*/out")
    assert f"--- {kept}\n42\n" in done.stdout
    assert kept.read_text() == "42\n"
    assert processes.logs  # of this test, which shows them if it fails
