"""Run a script in a fresh process on PJRT CPU and read the program that XLA compiled from it.

    found = probe(Path("step.py"), ["dc"])
    found.ops["dot"], found.temp_bytes, found.result

The compiler's dump holds each program's optimised text, from which operations are counted, and its buffer assignment,
from which the bytes of temporaries come. The largest program is the training step. XLA's CPU pipeline drops barriers
before it schedules, so its scheduler may move a recomputation to the front again; `keep_barrier` switches that one
pass off, as accelerators keep theirs, and results do not change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

COUNTED = (
    *("dot", "erf", "tanh", "opt-barrier", "while", "rng-bit-generator"),
    *("all-gather", "all-reduce", "reduce-scatter"),
)


@dataclass(frozen=True)
class Compiled:
    """What XLA made of the largest program of a process."""

    ops: dict[str, int]
    """Operations by name, in the whole optimised program."""
    temp_bytes: int
    """Bytes of the buffers that hold intermediate values."""
    barriers: list[str]
    """Shapes of what each optimization barrier ties together, such as "f32[64,128] f32[64,128]"; per device."""
    result: Any
    """The last line the script printed, as JSON."""


def probe(
    script: Path,
    argv: Sequence[str] = (),
    *,
    keep_barrier: bool = True,
    devices: int = 1,
    timeout: float = 600.0,
) -> Compiled:
    """Run `script` with `argv` on `devices` CPU devices. Raises RuntimeError with its stderr when it fails."""
    with tempfile.TemporaryDirectory() as dump:
        flags = [f"--xla_dump_to={dump}", "--xla_dump_hlo_as_text"]
        if keep_barrier:
            flags.append("--xla_disable_hlo_passes=cse_barrier_expander")
        search = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), *argv],
            env={
                **os.environ,
                "PYTHONPATH": search,
                "PJRT_DEVICE": "CPU",
                "CPU_NUM_DEVICES": str(devices),
                "XLA_FLAGS": " ".join(flags),
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{script.name} {' '.join(argv)} failed:\n{done.stderr[-4000:]}")
        programs = sorted(Path(dump).glob("*cpu_after_optimizations.txt"), key=lambda p: p.stat().st_size)
        text = programs[-1].read_text()
        buffers = programs[-1].with_name(programs[-1].stem + "-buffer-assignment.txt").read_text()
    lines = done.stdout.strip().splitlines()
    return Compiled(
        ops={name: len(re.findall(rf" {name}\(", text)) for name in COUNTED},
        temp_bytes=sum(
            int(size) for size in re.findall(r"^allocation \d+: size (\d+), preallocated-temp", buffers, re.M)
        ),
        barriers=[
            " ".join(re.findall(r"\w+\[[\d,]*\]", shapes))
            for shapes in re.findall(r"= (.*) opt-barrier\(", text)
        ],
        result=json.loads(lines[-1]) if lines else None,
    )


def probe_once(
    folder: Path, script: Path, argv: Sequence[str], *, devices: int = 1, timeout: float = 1200.0
) -> Compiled:
    """`probe(script, argv)`, run by one of the processes that share `folder`; the others wait for its result."""
    name = "-".join([script.stem, *argv])
    done = folder / f"{name}.json"
    try:
        os.close(os.open(folder / f"{name}.lock", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        give_up = time.monotonic() + timeout
        while not done.exists():
            if time.monotonic() > give_up:
                raise TimeoutError(f"another process did not finish {name}") from None
            time.sleep(0.2)
    else:
        try:
            found = asdict(probe(script, argv, devices=devices, timeout=timeout))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = {"failed": str(error)}
        draft = done.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(done)
    found = json.loads(done.read_text())
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return Compiled(**found)


def shared_folder(factory: pytest.TempPathFactory, config: pytest.Config) -> Path:
    """A folder for :func:`probe_once` that every worker of this run shares."""
    folder = factory.getbasetemp()
    return folder.parent if hasattr(config, "workerinput") else folder
