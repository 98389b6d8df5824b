"""The launch scripts: clean, printable, overridable, and one line for what they cannot use."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.job import SMALL, cells, forked, needs_cli
from tests.processes import ROOT, run

SCRIPTS = ["train.sh", "multinode.sh", "slurm.sbatch", "tpu_pod.sh"]
OURS = (
    "NPROC",
    "LOG_RANK",
    "LOG_DIR",
    "PYTHON",
    "SCRIPT",
    "HEAD",
    "PORT",
    "NNODES",
    "JOB",
    "RUN",
    "TPU",
    "ZONE",
    "PROJECT",
)
TORCHRUN = "python3 -m torch.distributed.run"


def launch(
    script: str, *arguments: str, path: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as from a clean shell; ``path`` comes first on PATH."""
    kept = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("SLURM_")}
    kept["PATH"] = os.pathsep.join([*([str(path)] if path else []), kept["PATH"]])
    return run([f"launch/{script}", *arguments], environment={**kept, **changes}, limit=200)


def printed(script: str, *arguments: str, **changes: str) -> str:
    done = launch(script, *arguments, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return " ".join(shlex.split(done.stdout)) if done.stdout.count("\n") == 1 else done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is a dev requirement: pip install -e '.[dev]'")
    done = subprocess.run([tool, f"launch/{script}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_executable_and_short(script: str) -> None:
    file = ROOT / "launch" / script
    assert os.access(file, os.X_OK)
    assert len(file.read_text().splitlines()) <= 70


def test_train_prints_its_command_and_the_environment_changes_it() -> None:
    c10d = "--rdzv-backend c10d --rdzv-endpoint localhost:0 --role rank --tee 3"
    assert printed("train.sh", "--print", "--steps", "5", "--data", "a b") == (
        f"{TORCHRUN} --nnodes 1 --nproc-per-node 2 {c10d} --local-ranks-filter 0 launch/train.py --steps 5 --data a b"
    )
    assert printed(
        "train.sh", "--print", NPROC="8", LOG_RANK="0,7", LOG_DIR="/logs", PYTHON="py", SCRIPT="s.py"
    ) == (
        f"py -m torch.distributed.run --nnodes 1 --nproc-per-node 8 {c10d} "
        "--local-ranks-filter 0,7 --log-dir /logs s.py"
    )


def test_a_dry_run_needs_no_ranks() -> None:
    assert printed("train.sh", "--dry-run", "--print", "--ranks", "512", "--parallel", "pp+fsdp") == (
        "python3 launch/dryrun.py --ranks 512 --parallel pp+fsdp"
    )


def test_multinode_prints_its_command_and_the_environment_changes_it() -> None:
    assert printed("multinode.sh", "--print", "--steps", "5", HEAD="node0") == (
        f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint node0:29500 "
        "--rdzv-id distckpt --rdzv-conf join_timeout=1800 --no-python launch/multinode.sh --rank --steps 5"
    )
    changed = printed(
        "multinode.sh", "--print", HEAD="h", PORT="1", NNODES="4", NPROC="8", JOB="j", RESTARTS="0"
    )
    for words in (
        "--nnodes 4",
        "--nproc-per-node 8",
        "--rdzv-endpoint h:1",
        "--rdzv-id j",
        "--max-restarts 0",
    ):
        assert words in changed


def test_a_rank_resumes_only_from_a_checkpoint_that_is_complete(tmp_path: Path) -> None:
    def arguments() -> list[str]:
        return printed(
            "multinode.sh", "--rank", "--steps", "5", RUN=str(tmp_path), PYTHON="echo", SCRIPT="x"
        ).split()

    fresh = ["x", "--save", str(tmp_path), "--save-every", "100", "--steps", "5"]
    assert arguments() == fresh
    (tmp_path / "step-000100").mkdir()
    assert arguments() == fresh
    (tmp_path / "step-000100" / "run.json").touch()
    assert arguments() == [*fresh[:5], "--resume", str(tmp_path), *fresh[5:]]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_usage_and_every_setting_and_needs_nothing(script: str, flag: str) -> None:
    done = launch(script, flag, PYTHON="false")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script}" in done.stdout
    assert "--print" in done.stdout
    assert "SBATCH" not in done.stdout
    source = (ROOT / "launch" / script).read_text()
    settings = re.findall(r"^([A-Z_]+)=\$\{\1:-", source, re.MULTILINE)
    assert all(f"\n  {name} (" in done.stdout for name in settings)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("multinode.sh", "--rdzv-endpoint HEAD:29500"),
        (
            "slurm.sbatch",
            "srun --nodes NNODES --ntasks NNODES --ntasks-per-node 1 --export=ALL launch/multinode.sh",
        ),
        ("tpu_pod.sh", "gcloud compute tpus tpu-vm ssh TPU --zone ZONE"),
    ],
)
def test_a_command_is_shown_without_the_clusters_variables_and_tools(script: str, words: str) -> None:
    assert words in printed(script, "--print")


def test_slurm_without_scontrol_is_one_line_with_the_fix() -> None:
    done = launch("slurm.sbatch", **SLURM)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "launch/slurm.sbatch: there is no scontrol to name the first node: HEAD=node0 sbatch launch/slurm.sbatch ...\n"
    )


def stub(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


SLURM = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}


def test_slurm_starts_one_agent_per_node_and_they_meet_at_the_first(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", '[[ $* == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"')
    stub(
        tmp_path, "srun", 'echo "srun $*" >&2; while [[ $1 != launch/* ]]; do shift; done; exec "$@" --print'
    )
    done = launch("slurm.sbatch", "--steps", "5", path=tmp_path, **SLURM)
    assert done.returncode == 0, done.stderr
    srun = "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --export=ALL launch/multinode.sh --steps 5"
    assert done.stderr.strip() == srun
    for words in ("--nnodes 2", "--rdzv-endpoint node3:29500", "--rdzv-id distckpt-77", "--rank --steps 5"):
        assert words in done.stdout
    shown = launch("slurm.sbatch", "--print", "--steps", "5", path=tmp_path, **SLURM)
    assert (shown.stdout.strip(), shown.stderr) == (srun, "")


def test_a_tpu_pod_gets_the_command_on_every_worker_as_it_was_typed(tmp_path: Path) -> None:
    stub(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
    (tmp_path / "check out").mkdir()
    show = "import os, sys; print(os.getcwd(), os.environ['PJRT_DEVICE'], sys.argv[1:])"
    typed = [sys.executable, "-c", show, "a b", "$HOME", "--print"]
    setting = {"TPU": "pod", "ZONE": "z", "FOLDER": "check out"}
    done = launch("tpu_pod.sh", *typed, path=tmp_path, **setting)
    *words, command = done.stdout.splitlines()
    assert words == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "z", "--worker", "all", "--command"]
    worker = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert worker.stdout.strip() == f"{tmp_path}/check out TPU ['a b', '$HOME', '--print']"
    assert "--project p" in printed("tpu_pod.sh", "--print", PROJECT="p", **setting)
    assert printed("tpu_pod.sh", "--print", TPU="pod", ZONE="z").endswith(
        "--command cd distckpt && PJRT_DEVICE=TPU python3 -m distckpt doctor"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "changes", "words"),
    [
        (
            "train.sh",
            ["--parallel", "zigzag"],
            {},
            "--parallel 'zigzag' is unknown: use one of fsdp, ddp, pp, tp, pp+fsdp",
        ),
        ("train.sh", ["--parallel=x", "--print"], {}, "--parallel 'x' is unknown"),
        ("train.sh", ["--dry-run", "--parallel"], {}, "--parallel '' is unknown"),
        ("train.sh", [], {"NPROC": "all"}, "NPROC is 'all': give the number of ranks"),
        ("train.sh", [], {"PYTHON": "false"}, "false has no torch: activate the environment that has it"),
        ("multinode.sh", [], {"HEAD": "h", "PYTHON": "false"}, "false has no torch"),
        ("multinode.sh", [], {}, "HEAD is not set, so the machines cannot meet: HEAD=host"),
        ("multinode.sh", [], {"HEAD": "h", "NNODES": "1:4"}, "NNODES is '1:4': give the number of machines"),
        ("multinode.sh", [], {"HEAD": "h", "NPROC": "0"}, "NPROC is '0'"),
        (
            "slurm.sbatch",
            [],
            {},
            "SLURM_JOB_NODELIST is not set, so this is no SLURM job: sbatch launch/slurm.sbatch",
        ),
        ("slurm.sbatch", [], {**SLURM, "SLURM_SUBMIT_DIR": "/"}, "submit from the root of the checkout"),
        ("tpu_pod.sh", [], {}, "TPU is not set: TPU=name ZONE=zone"),
        ("tpu_pod.sh", [], {"TPU": "pod"}, "ZONE is not set: TPU=pod ZONE=zone"),
    ],
)
def test_what_a_script_cannot_use_is_one_line_with_the_fix_and_exit_code_2(
    script: str, arguments: list[str], changes: dict[str, str], words: str
) -> None:
    done = launch(script, *arguments, **changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"launch/{script}: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@needs_cli
def test_train_runs_two_ranks_and_shows_one(tmp_path: Path) -> None:
    options = [*SMALL, "--steps", "3"]
    done = launch("train.sh", *options, PYTHON=sys.executable, LOG_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("[rank")]
    assert shown
    assert all(line.startswith("[rank0]:") for line in shown)
    assert len(list(tmp_path.rglob("stdout.log"))) == 2
    plain = forked("--steps", 3)
    text = "\n".join(line.removeprefix("[rank0]:") for line in shown)
    for row in ("last loss", "last parameters"):
        assert cells(text, row) == cells(plain.stdout, row)
