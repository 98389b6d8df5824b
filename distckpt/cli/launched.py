"""How this process was launched: torchrun's variables, SLURM's, PJRT's, and what in them does not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distckpt.cli.page import Finding
from distckpt.errors import BadEnvironment

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # other launchers leave out the local ones
_START = "torchrun --nproc_per_node 2 -m distckpt doctor"


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int = 0
    size: int = 1
    local: int = 0
    address: str = ""
    port: int = 0


def place(environment: Mapping[str, str]) -> Place:
    """Where torchrun's variables put this process; the only one if there are none.

    Raises:
        BadEnvironment: some are missing, no numbers, or contradict each other.
    """
    if not any(environment.get(name) for name in ("RANK", "LOCAL_RANK")):
        return Place()
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        given = [name for name in TORCHRUN if environment.get(name)]
        raise BadEnvironment(
            f"{', '.join(given) or 'a rank'} set, {' and '.join(missing)} not",
            why="a job started like this waits for ranks that it cannot find",
            fix=f"start it with torchrun, which sets them all: {_START}",
        )
    numbers = {name: _number(name, environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    local = _number("LOCAL_RANK", environment.get("LOCAL_RANK") or environment["RANK"])
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise BadEnvironment(
            f"RANK is {rank} and WORLD_SIZE is {size}",
            why="ranks count from 0 and end below the size",
            fix=f"unset both and start with torchrun: {_START}",
        )
    return Place(rank, size, local, environment["MASTER_ADDR"], numbers["MASTER_PORT"])


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadEnvironment(
            f"{name} is {text!r}, not a number", fix=f"start with torchrun, which sets it: {_START}"
        ) from None


def findings(
    environment: Mapping[str, str], devices: Mapping[str, int | None], xla: str | None
) -> list[Finding]:
    """What the environment says; ``devices`` counts the device types that are on, ``xla`` is torch_xla's version."""
    return [
        *_torchrun(environment, devices),
        *_slurm(environment),
        *_pjrt(environment, xla),
    ]


def _torchrun(environment: Mapping[str, str], devices: Mapping[str, int | None]) -> list[Finding]:
    try:
        here = place(environment)
    except BadEnvironment as error:
        return [Finding.failed("torchrun", error)]
    if not here.address:
        return [Finding("off", "torchrun", "one process, no torchrun environment", f"for ranks: {_START}")]
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    text = f"rank {here.rank} of {here.size}, meeting at {here.address}:{here.port}, restart {restarts}"
    found = [Finding("ok", "torchrun", text)]
    count = devices.get("cuda")
    if count and here.local >= count:
        error = BadEnvironment(
            f"LOCAL_RANK is {here.local} and this machine shows {count} CUDA device(s)",
            why="every rank trains on a device of its own",
            fix=f"--nproc_per_node {count}, or show more devices in CUDA_VISIBLE_DEVICES",
        )
        found.append(Finding.failed("cuda", error))
    return found


def _slurm(environment: Mapping[str, str]) -> list[Finding]:
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks in ("", "1") or environment.get("RANK"):
        return []
    text = f"{tasks} tasks and no torchrun environment: each would train alone"
    return [Finding("warn", "slurm", text, "sbatch launch/slurm.sbatch runs torchrun once per node")]


def _pjrt(environment: Mapping[str, str], xla: str | None) -> list[Finding]:
    device = environment.get("PJRT_DEVICE")
    if device and xla is None:
        text = f"PJRT_DEVICE is {device} and torch_xla is not installed: XLA is not used"
        return [
            Finding("warn", "xla", text, "pip install torch==2.9.0 torch-xla==2.9.0, or unset PJRT_DEVICE")
        ]
    if xla is not None and not device:
        text = "PJRT_DEVICE is not set: torch_xla picks a device by itself"
        return [Finding("warn", "xla", text, "export PJRT_DEVICE=TPU, or CPU to try it without one")]
    return [Finding("ok", "xla", f"PJRT_DEVICE is {device}")] if device else []
