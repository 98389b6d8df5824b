"""The first running job, on two ranks under torchrun."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.launch.job import cells, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tyro") is None, reason="launch/ needs the cli extra: pip install -e '.[cli]'"
)


UNIT = 0.1  # MB: gloo's thread lets go of a gathered block's buffer sooner or later, so counts differ by one


@pytest.mark.parametrize(
    "arguments",
    [
        "--parallel fsdp",
        "--parallel fsdp --dtype bf16",
        "--parallel ddp",
        "--parallel pp --schedule 1F1B",
        "--parallel pp --schedule ZBVZeroBubble",
        "--parallel pp+fsdp --schedule InterleavedZeroBubble",
    ],
)
def test_the_three_ways_are_equal_to_the_bit(arguments: str) -> None:
    ranks = 4 if "pp+fsdp" in arguments else 2
    size = ["--layers", 4, "--context", 64, "--batch", 4]
    done = torchrun("--compare", "--steps", 3, *size, *arguments.split(), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit: losses, gradients and parameters of all three" in done.stdout
    for row in ("losses, all steps and ranks", "last gradients", "last parameters"):
        assert len({cell.removesuffix(" =") for cell in cells(done.stdout, row)}) == 1
    for row in ("kept for backward", "peak live tensors"):
        plain, torch_, ours = (float(cell.split()[0]) for cell in cells(done.stdout, row))
        assert ours <= torch_ + UNIT, row
        assert ours < plain, row


@pytest.mark.parametrize(
    ("parallel", "schedule", "torch_", "ours"),
    [("fsdp", "1F1B", "4", "4"), ("ddp", "1F1B", "4", "4")],
)
def test_how_often_blocks_are_recomputed(parallel: str, schedule: str, torch_: str, ours: str) -> None:
    done = torchrun("--compare", "--steps", 1, "--layers", 4, "--parallel", parallel, "--schedule", schedule)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cells(done.stdout, "recomputed") == ["0", torch_, ours]


@pytest.mark.parametrize(
    "arguments",
    ["--parallel fsdp", "--parallel tp", "--parallel pp --schedule ZBVZeroBubble"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(arguments: str, tmp_path: Path) -> None:
    same = [*arguments.split(), "--layers", 4, "--batch", 4]
    whole = torchrun("--steps", 4, "--save", tmp_path, "--save-every", 2, *same)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    resumed = torchrun("--steps", 4, "--resume", tmp_path / "step-000002", *same)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert cells(resumed.stdout, "steps") == ["3 to 4"]
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
