"""Two accelerator types at once; the tests are in pair_backends.py and run in a process of their own."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.pair import run_pair_file


def test_two_accelerator_types_keep_apart() -> None:
    run_pair_file(Path(__file__).with_name("pair_backends.py"))
