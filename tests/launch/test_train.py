"""The first running job, on two ranks under torchrun."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest

from tests.launch.job import cells, forked, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tyro") is None, reason="launch/ needs the cli extra: pip install -e '.[cli]'"
)


UNIT = 0.1  # MB: gloo's thread lets go of a gathered block's buffer sooner or later, so counts differ by one


@pytest.mark.parametrize(
    ("arguments", "torch_", "ours", "early"),
    [
        ("--parallel fsdp", 4, 4, None),
        ("--parallel fsdp --dtype bf16", 4, 4, None),
        ("--parallel ddp", 4, 4, None),
        ("--parallel pp --schedule 1F1B", 8, 8, 4),  # the newer of the two blocks of each micro-batch
        ("--parallel pp --schedule GPipe --ahead '1 micro-batch'", 8, 8, 8),
        ("--parallel pp --schedule ZBVZeroBubble", 56, 8, 4),
        ("--parallel pp+fsdp --schedule InterleavedZeroBubble --no-early-replay", 20, 8, 0),
    ],
)
def test_the_three_ways_are_equal_to_the_bit(
    arguments: str, torch_: int, ours: int, early: int | None
) -> None:
    ranks = 4 if "pp+fsdp" in arguments else 2
    size = ["--layers", 4, "--context", 64, "--batch", 4]
    start = torchrun if arguments == "--parallel fsdp" else forked
    done = start("--compare", "--steps", 3, *size, *shlex.split(arguments), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit: losses, gradients and parameters of all three" in done.stdout
    for row in ("losses, all steps and ranks", "last gradients", "last parameters"):
        assert len({cell.removesuffix(" =") for cell in cells(done.stdout, row)}) == 1
    assert cells(done.stdout, "recomputed") == ["0", str(torch_), str(ours)]
    plain, torchs, mine = (float(cell.split()[0]) for cell in cells(done.stdout, "peak live tensors"))
    assert mine < plain
    if "--ahead" not in arguments:
        assert mine <= torchs + UNIT
    if early is not None:
        assert cells(done.stdout, "replayed before a gradient") == ["0", "0", str(early)]


def test_tensor_parallel_ranks_drop_heads_of_their_own_and_only_our_replays_drop_the_same() -> None:
    done = forked("--compare", "--steps", 2, "--parallel", "tp")
    assert done.returncode == 0, done.stdout + done.stderr
    none, torch_, ours = cells(done.stdout, "last gradients")
    assert ours == f"{none} ="
    assert torch_.endswith("DIFFERS")
    assert "torch.utils.checkpoint differs" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    ["--parallel fsdp", "--parallel tp", "--parallel pp --schedule ZBVZeroBubble"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(arguments: str, tmp_path: Path) -> None:
    same = [*arguments.split(), "--layers", 4, "--batch", 4]
    whole = forked("--steps", 4, "--save", tmp_path, "--save-every", 2, *same)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    resumed = forked("--steps", 4, "--resume", tmp_path / "step-000002", *same)
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
