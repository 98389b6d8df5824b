"""Runs suites on the torch of an environment, and writes what came of them into docs/torch-versions.md.

    python benchmarks/torch_versions.py .venv-torch-2.15.0/bin/python                # every suite
    python benchmarks/torch_versions.py .venv-torch-2.12.0/bin/python compat engine  # some: the other cells stay

Exit code 1 when a test failed; the page says so too.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "torch-versions.md"
SUITES = ("backends", "engine", "policy", "modules", "compat", "ranks", "integrations")


def counts(python: str, suite: str) -> str:
    """What pytest says at its end: ``"96 passed, 2 skipped"``."""
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        "1",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        f"tests/{suite}",
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=False
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    print(
        "\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))) or last,
        flush=True,
    )
    return ", ".join(re.findall(r"\d+ (?:failed|errors?|passed|skipped)", last)) or last


def write(version: str, found: dict[str, str]) -> None:
    """Change the cells of this version's row, and its day."""
    lines = PAGE.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith(f"| {version.rpartition('.')[0]}"))
    cells = [cell.strip() for cell in lines[row].strip("|").split("|")]
    for number, suite in enumerate(SUITES, 1):
        cells[number] = found.get(suite, cells[number])
    lines[row] = f"| {' | '.join([version, *cells[1:-1], datetime.date.today().isoformat()])} |"
    PAGE.write_text("\n".join(lines) + "\n")


def main(python: str, suites: list[str]) -> int:
    """Run ``suites`` (all when empty), one after another."""
    ask = [python, "-c", "import torch; print(torch.__version__.split('+')[0])"]
    version = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    failed = False
    for suite in suites or SUITES:
        said = counts(python, suite)
        failed |= "passed" not in said or "failed" in said or "error" in said
        write(version, {suite: said})
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
