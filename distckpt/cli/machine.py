"""What this machine has: versions, and every device type with the reason why it is off."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

import distckpt_backends
from distckpt_backends import Backend

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


def device_types() -> list[str]:
    """Every device type that there could be here, CPU first."""
    return list(distckpt_backends.known_types())


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


_FIXES = {"xla": "install the extra: pip install 'distckpt[xla]', in an environment of its own"}


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
