"""The first running job, on two ranks under torchrun."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.launch.job import cells, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tyro") is None, reason="launch/ needs the cli extra: pip install -e '.[cli]'"
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_three_ways_are_equal_to_the_bit_on_two_ranks(dtype: str) -> None:
    done = torchrun("--compare", "--steps", 3, "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit: losses, gradients and parameters of all three" in done.stdout
    for row in ("losses, all steps and ranks", "last gradients", "last parameters"):
        assert len({cell.removesuffix(" =") for cell in cells(done.stdout, row)}) == 1
    assert cells(done.stdout, "recomputed") == ["0", "2", "2"]
    plain, torch_, ours = (float(c.split()[0]) for c in cells(done.stdout, "kept for backward"))
    assert ours <= torch_ < plain
    plain, torch_, ours = (float(c.split()[0]) for c in cells(done.stdout, "peak live tensors"))
    assert ours <= torch_ < plain


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole = torchrun("--steps", 6, "--save", tmp_path, "--save-every", 3)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    resumed = torchrun("--steps", 6, "--resume", tmp_path / "step-000003")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert cells(resumed.stdout, "steps") == ["4 to 6"]
    for row in ("last loss", "last gradients", "last parameters"):
        assert cells(resumed.stdout, row) == cells(whole.stdout, row)


def test_bad_input_on_two_ranks_is_one_line_with_the_fix(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = torchrun("--data", missing)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("launch/train.py: ")]
    assert lines == [
        f"launch/train.py: [DC502] --data {missing} does not exist: give a file or a folder of text"
    ]
    assert "exitcode  : 2" in done.stderr
