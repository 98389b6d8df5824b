"""What this machine has: versions, and every device type with the reason why it is off."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings
from typing import Any

import distckpt_backends
from distckpt_backends import Backend, private
from distckpt_backends.errors import UnsupportedTorch

from distckpt import __version__
from distckpt.cli.page import Finding

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


def device_types() -> list[str]:
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
    for kind in device_types():
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
