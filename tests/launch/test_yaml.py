"""The two YAML files: true to their schemas, and to the scripts that they start."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.job import ROOT, SMALL, cells, forked, needs_cli

LAUNCH = ROOT / "launch"


@pytest.fixture
def manifests() -> dict[str, Any]:
    """The objects of kubernetes.yaml by kind."""
    yaml = pytest.importorskip("yaml", reason="a dev requirement: pip install -e '.[dev]'")
    return {found["kind"]: found for found in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())}


def test_kubernetes_objects_follow_the_schema_of_several_versions(manifests: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="a dev requirement: pip install -e '.[dev]'")
    versions = [validate.latest_version(), "1.31"]  # backoffLimitPerIndex is on by default from 1.29
    for version in versions:
        for found in manifests.values():
            validate.validate(found, version, strict=True)


def test_a_wrong_key_would_be_found(manifests: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="a dev requirement: pip install -e '.[dev]'")
    manifests["Job"]["spec"]["completionmode"] = "Indexed"
    with pytest.raises(validate.ValidationError):
        validate.validate(manifests["Job"], validate.latest_version(), strict=True)


def test_the_job_starts_as_many_agents_as_wait_for_each_other(manifests: dict[str, Any]) -> None:
    job, service = manifests["Job"]["spec"], manifests["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(environment["NNODES"])
    assert environment["HEAD"] == f"{manifests['Job']['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == job["template"]["metadata"]["labels"]
    (mounted,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "runs"]
    assert environment["RUN"].startswith(mounted + "/")
    script = ROOT / container["command"][0]
    assert all(re.search(rf"^{name}=", script.read_text(), re.M) for name in environment)


def launch_line() -> list[str]:
    """The command that accelerate.yaml gives in its first comment."""
    found = re.search(r"^#   (accelerate launch .+)$", (LAUNCH / "accelerate.yaml").read_text(), re.M)
    assert found
    return shlex.split(found[1])


def test_accelerate_knows_every_key_of_its_file() -> None:
    args = pytest.importorskip(
        "accelerate.commands.config.config_args", reason="needs the hf extra: accelerate"
    )
    config = args.load_config_from_file(str(LAUNCH / "accelerate.yaml"))
    assert config.fsdp_config["fsdp_activation_checkpointing"] is False
    launch = pytest.importorskip("accelerate.commands.launch")
    flags = {action.dest for action in launch.launch_command_parser()._actions}
    assert set(config.fsdp_config) <= flags


@needs_cli
def test_accelerate_launch_runs_two_ranks_with_the_same_bits() -> None:
    pytest.importorskip("accelerate", reason="needs the hf extra: accelerate")
    program, launch, *rest = launch_line()
    assert (program, launch) == ("accelerate", "launch")
    at = rest.index("launch/train.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *rest[: at + 1], *SMALL, "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    plain = forked("--steps", 3)
    for row in ("last loss", "last parameters"):
        assert cells(done.stdout, row) == cells(plain.stdout, row)


def test_the_launch_line_names_files_that_exist() -> None:
    files = [Path(word) for word in launch_line() if word.startswith("launch/")]
    assert [file.name for file in files] == ["accelerate.yaml", "train.py"]
    assert all((ROOT / file).is_file() for file in files)
