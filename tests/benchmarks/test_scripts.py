"""Every benchmark runs from the command line, at counts too small to say anything about speed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests import processes

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, status: int = 0) -> str:
    """Run a benchmark script in a process of its own and return what it prints."""
    paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = processes.run(command, limit=120, environment=environment)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_overhead_times_every_variant_on_every_engine() -> None:
    printed = run("overhead.py", "--rounds", "1", "--calls", "2", "--saved", "1", "--no-write")
    for variant in ("default", "nested", "selective, list", "reentrant", "no_grad"):
        rows = [line for line in printed.splitlines() if line.startswith(f"| {variant} ")]
        assert len(rows) == 3, variant


def test_memory_never_exceeds_torchs_in_any_case() -> None:
    # bytes, not seconds: this one does not depend on the machine
    printed = run("memory.py", "--kib", "64", "--no-write")
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line
    )
    assert len(rows) == 14
    for row in rows:
        peaks = {name: float(cell) for name, cell in zip(header[2:], row[2:], strict=True)}
        assert peaks["dc"] <= peaks["torch"] + 0.3, row
        assert peaks["compat"] <= peaks["torch"] + 0.3, row


def test_gpt_block_gives_equal_gradients() -> None:
    printed = run("gpt_block.py", "--device", "cpu", "--width", "32", "--rounds", "1", "--no-write")
    assert printed.count("| yes ") == 4


def test_the_gpu_script_runs_every_part_small_without_a_gpu() -> None:
    printed = run("gpu.py", "--device", "cpu", "--no-write")
    peaks = dict(re.findall(r"^\| (none|torch|dc) +\| (\d+\.\d) ", printed, flags=re.MULTILINE))
    assert set(peaks) == {"none", "torch", "dc"}
    assert float(peaks["dc"]) <= float(peaks["torch"]) < float(peaks["none"])
    assert printed.count("| yes ") == 4
    for variant in ("default", "rng off", "selective, list", "no_grad"):
        assert f"| {variant} " in printed
    assert "3 skipped" in printed or "passed" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_in_one_sentence_that_there_is_no_gpu() -> None:
    printed = run("gpu.py", status=2)
    assert "no GPU here" in printed
    assert len(printed.splitlines()) == 1


def test_partitioned_inputs_give_equal_gradients_at_half_the_bytes() -> None:
    printed = run("ranks_partition.py", "--rounds", "1", "--tokens", "64", "--no-write")
    assert printed.count("| yes ") == 6
    assert printed.count("| 0.50 ") == 2
    assert printed.count("| 0.25 ") == 4


def test_what_is_not_checked_is_measured() -> None:
    printed = run("unseen.py", "--rounds", "1", "--widths", "64")
    assert len(re.findall(r"\| \d+\.\d% *\|$", printed, re.M)) == 8


def test_compose_reports_its_programs() -> None:
    printed = run("compose.py", "--engine", "compat", "--count", "10", "--no-write")
    assert "0 failures" in printed


def test_ranks_check_raises_on_every_rank_and_counts_its_requests() -> None:
    printed = run("ranks_check.py", "--worlds", "2", "3", "--rounds", "2", "--no-write")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:]]
    assert [row[0] for row in rows] == ["2", "3"]
    assert [row[6] for row in rows] == ["2", "3"]
    assert [row[7] for row in rows] == ["20", "26"]  # 6 per rank and 8


def test_ranks_fsdp_gathers_no_more_with_our_regions_than_without() -> None:
    printed = run("ranks_fsdp.py", "--rounds", "1", "--no-write")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line
    ]
    for none, _, dc in zip(rows[2::3], rows[3::3], rows[4::3], strict=True):
        assert dc[2:4] == none[2:4]
        assert (none[4], dc[4], dc[-1]) == ("1", "2", "yes")


@pytest.mark.skipif(
    torch.__version__.startswith("2.9"), reason="torch 2.9 cannot run all schedules over gloo"
)
def test_pipelines_run_a_block_twice_where_torchs_engine_runs_it_six_times() -> None:
    # every schedule: tests/ranks/test_pipeline.py
    names = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
    printed = run("ranks_pipeline.py", "schedules", "--rounds", "1", "--only", *names)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    runs = {(row[0], row[1]): row[3] for row in rows if len(row) == 5}
    for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble"):
        assert runs[schedule, "torch"] == "2 to 6"
        assert runs[schedule, "early"] == "2"
    assert runs["1F1B", "torch"] == "2"
    assert runs["1F1B", "early"] == "1 to 2"


def test_pipelines_that_sleep_replay_early() -> None:
    printed = run("ranks_pipeline.py", "sleep", "--rounds", "1", "--seconds", "0", "--no-write")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    early = {(row[0], row[1]): row[4] for row in rows if len(row) == 5}
    assert early["2 ranks, 4 micro-batches", "early"] == "8"
    assert early["2 ranks, 4 micro-batches", "default"] == "4"
    assert early["2 ranks, 4 micro-batches", "after"] == "0"


def test_the_benchmark_page_is_what_the_result_files_say() -> None:
    run("docs.py", "--check")
