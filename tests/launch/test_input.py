"""What the job says to input that it cannot use: one line, the fix in it, exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="launch/ needs the cli extra: pip install -e '.[cli]'")

from launch.app import BAD_INPUT, run
from launch.folder import NOTE
from tests.launch.job import ROOT

# torch 2.9's own torch.distributed.checkpoint says this when it writes.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

SMALL = ["--layers", "1", "--width", "8", "--context", "8", "--ckpt", "none"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "30"], ["DC501", "multiple of --heads 4", "try 28"]),
        (["--steps", "0"], ["DC501", "--steps is 0", "1 or more"]),
        (["--parallel", "pp", "--batch", "6"], ["DC501", "multiple of --micro-batches 4", "try 4"]),
        (["--parallel", "tp", "--dtype", "bf16"], ["DC501", "--parallel tp has none", "use --dtype fp32"]),
        (["--parallel", "pp+fsdp"], ["DC501", "1 ranks", "--nproc_per_node 4"]),
        (
            ["--parallel", "pp", "--schedule", "ZBVZeroBubble", "--layers", "1"],
            ["DC501", "2 stages", "give 2"],
        ),
        (["--dropout", "1"], ["DC501", "below 1"]),
        (["--lr", "0"], ["DC501", "above 0"]),
        (["--lr", "nan"], ["DC501", "--lr is nan", "above 0"]),
        (["--lr", "inf"], ["DC501", "--lr is inf", "above 0"]),
        (["--dropout", "nan"], ["DC501", "--dropout is nan", "below 1"]),
        (["--seed", str(10**30)], ["DC501", "at most 12 digits"]),
        (["--save-every", "2"], ["DC501", "--save FOLDER"]),
        (["--save-every", "-1"], ["DC501", "0 to save at the end"]),
        (["--ahead", "1 GiB"], ["DC501", "--ahead 1 GiB is for pipelines", "--parallel pp"]),
        (["--parallel", "pp", "--ahead", "1 GiB", "--ckpt", "torch"], ["DC501", "for --ckpt distckpt"]),
        (["--parallel", "pp", "--ahead", "1 GiB", "--no-early-replay"], ["leave out --no-early-replay"]),
        (["--parallel", "pp", "--ahead", "much"], ["DC501", "--ahead much is no amount", '"800 MB"']),
        (["--parallel", "pp", "--ahead", "0"], ["DC501", "--ahead 0 is no amount"]),
        (["--compare", "--resume", "x"], ["DC501", "leave out --save and --resume"]),
        (["--resume", "nowhere"], ["DC503", "the folder that --save wrote"]),
        (["--data", "nowhere"], ["DC502", "give a file or a folder"]),
    ],
)
def test_bad_input_is_one_line_with_the_fix_and_exit_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == BAD_INPUT
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert all(word in said[0] for word in words), said[0]


def test_half_a_torchrun_environment_is_one_line_with_the_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run(SMALL) == BAD_INPUT
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        "launch/train.py: [DC703] RANK set, WORLD_SIZE and MASTER_ADDR and MASTER_PORT not"
    )
    assert "start it with torchrun" in said


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("twelve bytes")
    assert run([*SMALL, "--data", str(tmp_path)]) == BAD_INPUT
    assert "has 12 bytes of text, too few" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"step": 2, "ranks": 4}, "--nproc_per_node 4, not 1"),
        ({"step": 2, "ranks": 1, "options": {"dtype": "bf16"}}, "--dtype bf16, not fp32"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(
    note: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NOTE).write_text(json.dumps({"options": {}, **note}))
    assert run([*SMALL, "--resume", str(tmp_path)]) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_a_checkpoint_that_is_past_the_last_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--steps", "1", "--save", str(tmp_path)]) == 0
    assert run([*SMALL, "--steps", "1", "--resume", str(tmp_path)]) == BAD_INPUT
    assert "give --steps above 1" in capsys.readouterr().err


def test_a_folder_that_was_not_written_to_the_end_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, "--steps", "2", "--save", str(tmp_path), "--save-every", "1"]) == 0
    (tmp_path / "step-000002" / NOTE).unlink()
    assert run([*SMALL, "--steps", "2", "--resume", str(tmp_path)]) == 0
    assert "step-000001 after 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["tyro", "plotille", "rich", "torch"])
@pytest.mark.parametrize("script", ["train.py", "dryrun.py"])
def test_without_a_package_help_is_there_or_one_line_with_the_fix(script: str, missing: str) -> None:
    block = f"import runpy, sys; sys.modules['{missing}'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", block + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = subprocess.run(
        [*command, f"launch/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        assert "usage: " in done.stdout
        return
    assert done.returncode == BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"launch/{script}: [DC500] {missing} is not installed: pip install ")
