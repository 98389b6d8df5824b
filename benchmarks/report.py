"""Result files of the benchmarks: one JSON each, with the machine in general words."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Describe the machine without naming it."""
    words: dict[str, Any] = {
        "processor": f"{os.cpu_count()} {platform.machine()} cores, shared with other jobs; one thread used",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": None,
    }
    if torch.cuda.is_available():
        words["accelerator"] = torch.cuda.get_device_name()
    return words


def write(name: str, command: str, content: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    body = {"command": command, "machine": machine(), **content}
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown that also reads well in a terminal."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def load(name: str) -> dict[str, Any] | None:
    """Return a result file's content, or None where it was never made."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(result: dict[str, Any]) -> str:
    """Say how a table was made and on what."""
    machine = result["machine"]
    device = f", {machine['accelerator']}" if machine["accelerator"] else ""
    return (
        f"Made by `{result['command']}` on {machine['processor']}{device}; "
        f"Python {machine['python']}, torch {machine['torch']}.\n"
    )
