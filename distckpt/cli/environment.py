"""What is here: versions and device types, how this process was launched, and libraries that checkpoint too."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import distckpt_backends
from distckpt_backends import Backend, private
from distckpt_backends.errors import UnsupportedTorch

from distckpt import __version__
from distckpt.cli.report import Finding
from distckpt.errors import BadEnvironment, Conflict

_WITH = ("torch-xla", "transformers", "accelerate", "numpy")


def installed(name: str) -> str | None:
    """The version of a distribution, read without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What a bug report needs, by name."""
    import torch

    found = {"distckpt": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {name: version for name in _WITH if (version := installed(name)) is not None}
    return found | {"platform": f"{sys.platform} {platform.machine()}"}


_ROOMS = ("distckpt_backends._torch", "distckpt._torch", "distckpt._torch_dist")


def torch_findings() -> list[Finding]:
    """Whether this torch was tried, and what it lacks of the private names that we need."""
    lacking: dict[str, UnsupportedTorch] = {}
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is a line below
        for room in _ROOMS:
            try:
                names = importlib.import_module(room).NAMES
            except UnsupportedTorch as error:
                lacking[error.what] = error
                continue
            for feature, needed in names.table.items():
                try:
                    names.need(feature)
                    count += len(needed)
                except UnsupportedTorch as error:
                    lacking[error.what] = error
                except ImportError:  # a torch without torch.distributed
                    continue
    found = [Finding.failed("private names", error) for error in lacking.values()]
    tried = f"tried on torch {private.text(private.OLDEST)} to {private.text(private.NEWEST)}"
    found = found or [Finding("ok", "private names", f"all {count} that are needed; {tried}")]
    newer = private.untried()
    if newer is not None:
        found.append(Finding("warn", "version", newer))
    return found


def regions_work() -> bool:
    """Whether this torch has what every region needs."""
    try:
        importlib.import_module("distckpt._torch")
        distckpt_backends.known_types()
    except UnsupportedTorch:
        return False
    return True


def types_present() -> list[str]:
    """Every device type that there could be here, CPU first; none where this torch cannot tell."""
    try:
        return list(distckpt_backends.known_types())
    except UnsupportedTorch:
        return []


def why_off(kind: str) -> tuple[Backend | None, str | None]:
    """The backend of ``kind``, and why it cannot be used here. Starts no device."""
    mismatch = xla_mismatch() if kind == "xla" else None
    if mismatch is not None:
        return None, mismatch  # importing it could take the process down
    try:
        backend = distckpt_backends.get(kind)
        return backend, backend.why_unavailable()
    except Exception as error:  # a plugin may fail in a way of its own, and a report must not
        return None, str(error).splitlines()[0]


def xla_mismatch() -> str | None:
    """Why the installed torch_xla cannot go with the installed torch."""
    import torch

    xla = installed("torch-xla")
    mine = str(torch.__version__)
    if xla is None or xla.split(".")[:2] == mine.split(".")[:2]:
        return None
    return f"torch_xla {xla} goes with torch {'.'.join(xla.split('.')[:2])}, and this is torch {mine}"


def devices() -> list[dict[str, Any]]:
    """One entry per device type: ``type``, ``on``, ``reason``, ``count``, ``capabilities`` and the reasons of those
    that it lacks. Nothing is initialised for it; ``count`` is None where only a running device can tell."""
    found = []
    for kind in types_present():
        backend, reason = why_off(kind)
        on = backend is not None and reason is None
        count = backend.device_count() if backend is not None and on else 0
        flags = backend.capabilities if backend is not None and on else None
        found.append(
            {
                "type": kind,
                "on": on,
                "reason": reason,
                "count": count if count or not on else None,
                "capabilities": flags.flags() if flags is not None else {},
                "reasons": dict(flags.reasons) if flags is not None else {},
            }
        )
    return found


_FIXES = {"xla": "pip install torch==2.9.0 torch-xla==2.9.0, in an environment of its own"}


def device_findings(entries: list[dict[str, Any]]) -> list[Finding]:
    """A line per device type."""
    found = []
    for entry in entries:
        if not entry["on"]:
            found.append(Finding("off", entry["type"], entry["reason"], _FIXES.get(entry["type"])))
            continue
        count = entry["count"]
        many = "counted when it starts" if count is None else f"{count} device" + ("s" if count > 1 else "")
        able = ", ".join(flag for flag, on in entry["capabilities"].items() if on)
        found.append(Finding("ok", entry["type"], f"{many}: {able.replace('_', ' ')}"))
    return found


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


def launch_findings(
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


# What these do at import; nothing is imported to find that out.
_PATCHERS = {
    "unsloth": "replaces torch.utils.checkpoint.checkpoint when it is imported",
    "unsloth_zoo": "replaces torch.utils.checkpoint.checkpoint when it is imported",
}


def neighbour_findings(environment: Mapping[str, str], imports: Sequence[str] = ()) -> list[Finding]:
    """A line per neighbour that is installed, and one per name of torch's that somebody replaced.

    ``imports`` are modules to import first, for what they patch.
    """
    found = [*_accelerate(environment), *_transformers()]
    for name, what in _PATCHERS.items():
        version = installed(name)
        if version is not None:
            fix = "import it first, then use dc.apply or dc.checkpoint; see: distckpt doctor --import " + name
            found.append(Finding("warn", f"{name} {version}", what, fix))
    for name in imports:
        found += _imported(name)
    found += _patched()
    return found or [Finding("ok", "none", "no library here is known to conflict")]


def _accelerate(environment: Mapping[str, str]) -> list[Finding]:
    version = installed("accelerate")
    if version is None:
        return []
    subject = f"accelerate {version}"
    place = _loses_rng()
    switch = _accelerate_switch(environment)
    if switch and place:
        error = Conflict(
            f"{switch}: its FSDP2 checkpointing drops the random state, so dropout gradients are wrong",
            why=f"preserve_rng_state=False, {place}",
            fix="turn that off and call dc.apply(model, ...) before Accelerator.prepare",
        )
        return [Finding.failed(subject, error)]
    if place:
        text = f"its own FSDP2 checkpointing is off, and should stay off: it drops the random state ({place})"
        return [Finding("ok", subject, text)]
    return [Finding("ok", subject, "call dc.apply(model, ...) before Accelerator.prepare")]


def _loses_rng() -> str | None:
    """Where the installed accelerate turns the random state off, read from its source."""
    spec = find_spec("accelerate")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "utils" / "fsdp_utils.py"
        if file.is_file():
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
                if "checkpoint_wrapper(" in line and "preserve_rng_state=False" in line:
                    return f"{file.name}:{number}"
    return None


def _accelerate_switch(environment: Mapping[str, str]) -> str | None:
    """The switch that turns accelerate's own checkpointing on in this environment, or None."""
    name = "FSDP_ACTIVATION_CHECKPOINTING"
    if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
        return f"{name}={environment[name]}"
    cache = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    file = Path(cache) / "accelerate" / "default_config.yaml"
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name.lower() and value.split("#")[0].strip().lower() == "true":
                return f"{name.lower()} in {file}"
    return None


def _transformers() -> list[Finding]:
    version = installed("transformers")
    if version is None:
        return []
    old = version.split(".")[0].isdigit() and int(version.split(".")[0]) < 5
    flag = "gradient_checkpointing" if old else "activation_checkpointing"
    text = f"leave TrainingArguments({flag}=) at False where you use dc.apply: it replaces our function"
    return [Finding("ok", f"transformers {version}", text)]


def _imported(name: str) -> list[Finding]:
    try:
        importlib.import_module(name)
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return [Finding("fail", name, text, "leave out --import, or install it", Conflict.code)]
    return []


def _watched() -> list[tuple[str, Any]]:
    """Names of torch's that a checkpointing library may replace, with what they are now."""
    import torch
    import torch.utils.checkpoint as torchs

    hooks = torch.autograd.graph.saved_tensors_hooks
    return [
        *((f"torch.utils.checkpoint.{name}", getattr(torchs, name, None)) for name in torchs.__all__),
        ("torch.autograd.backward", torch.autograd.backward),
        ("torch.autograd.graph.saved_tensors_hooks", hooks),
        ("torch.Tensor.backward", torch.Tensor.backward),
    ]


def patched() -> list[tuple[str, str]]:
    """Names of torch's that are somebody else's now, each with the module that it comes from."""
    found = []
    for name, value in _watched():
        if not callable(value):
            continue
        home = getattr(value, "__module__", None) or ""
        code = getattr(value, "__code__", None)
        if code is not None and _module_of(code) is not None:
            home = _module_of(code) or home  # a wrapper may call itself torch's
        if home.split(".")[0] not in ("torch", "distckpt", "typing", "contextlib", "builtins"):
            found.append((name, home))
    return found


def _module_of(code: Any) -> str | None:
    """The module that a function's file belongs to: its name says little where functools.wraps was used."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == code.co_filename:
            return name
    return None


def _patched() -> list[Finding]:
    by_module: dict[str, list[str]] = {}
    for name, module in patched():
        by_module.setdefault(module, []).append(name)
    return [
        Finding.failed(
            module,
            Conflict(
                f"replaces {', '.join(names)}",
                why="code that calls these names reaches neither torch nor us",
                fix="import it before distckpt.compat.install(), or use dc.apply and dc.checkpoint by name",
            ),
        )
        for module, names in by_module.items()
    ]
