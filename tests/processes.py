"""Processes that tests start: given time on a busy machine, ended with all they started, heard when a test fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TOKEN = "DISTCKPT_TEST_PROCESS"  # every process inherits it, whatever session or parent it has
_PROC = Path("/proc")

logs: list[Path] = []
"""What the processes of the running test print into; `conftest.py` shows them with a failure, and empties the list."""


class Late(AssertionError):
    """A process did not end in time."""


class Limit:
    """Seconds of this machine without other work: while more wants to run than it has cores, they pass more slowly."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._looked = time.monotonic()

    def over(self) -> bool:
        """Whether they have passed. Ask often: the load between two questions is the load at the second."""
        now = time.monotonic()
        self._left -= (now - self._looked) / slowdown()
        self._looked = now
        return self._left <= 0


def slowdown() -> float:
    """How many times slower this machine is for its load; 1 when a core is free."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Process(subprocess.Popen[bytes]):
    """A started command, with its output in files."""

    out: Path
    err: Path
    token: str

    def within(self, limit: Limit | float) -> int:
        """Its exit code.

        Raises:
            Late: it has not ended within ``limit``.
        """
        limit = Limit(limit) if isinstance(limit, (int, float)) else limit
        while self.poll() is None:
            if limit.over():
                raise Late(f"not done in time: {self.args!r}\n{self.printed()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0.2)
        return self.returncode

    def printed(self) -> str:
        """All that it has printed so far."""
        return "".join(file.read_text(errors="replace") for file in dict.fromkeys((self.out, self.err)))


@contextlib.contextmanager
def started(
    command: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    together: bool = False,
) -> Iterator[Process]:
    """Start ``command``. At the end, also after a failure, it and all that it has started are gone.

    Args:
        environment: instead of this process's.
        together: whether errors go where the output goes.
    """
    folder = Path(tempfile.mkdtemp(prefix="distckpt-test-"))
    logs.append(folder)
    token = uuid.uuid4().hex
    out, err = folder / "out", folder / ("out" if together else "err")
    with out.open("wb") as output, contextlib.nullcontext(output) if together else err.open("wb") as errors:
        process = Process(
            list(map(str, command)),
            cwd=cwd,
            env={**(os.environ if environment is None else environment), _TOKEN: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    process.out, process.err, process.token = out, err, token
    try:
        yield process
    finally:
        end(process)


def run(
    command: Sequence[object],
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end, with :func:`started`; as ``subprocess.run`` with captured text.

    Raises:
        Late: it has not ended within ``limit``.
    """
    with started(command, environment=environment, cwd=cwd) as process:
        code = process.within(limit)
        return subprocess.CompletedProcess(
            process.args, code, process.out.read_text(), process.err.read_text()
        )


def end(process: Process) -> None:
    """End a process and all that it has started, at once, as a power switch does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while pids := family(process.token):  # again, for what was started meanwhile
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def family(token: str) -> list[int]:
    """The living processes that were started under ``token``, where the system tells; zombies have no environment."""
    found = []
    for entry in _PROC.glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{_TOKEN}={token}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def forget(keep: bool) -> str:
    """The logs of a test that is over, as one text; taken away unless ``keep``."""
    said = []
    for folder in logs:
        for file in sorted(folder.glob("*")) if keep else ():
            said.append(f"--- {file}\n{file.read_text(errors='replace')}")
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    logs.clear()
    return "\n".join(said)
