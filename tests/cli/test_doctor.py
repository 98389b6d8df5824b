"""``distckpt doctor`` in one process: its report, its JSON and its exit code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt.cli import environment, selftest
from distckpt.cli.main import main

from .process import ROOT, distckpt


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "PJRT_DEVICE",
        "SLURM_NTASKS",
        "FSDP_ACTIVATION_CHECKPOINTING",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def whole() -> subprocess.CompletedProcess[str]:
    return distckpt("doctor", PJRT_DEVICE="", HF_HOME="/nowhere")


def test_the_report_says_what_is_here_and_ends_with_the_next_command(
    whole: subprocess.CompletedProcess[str],
) -> None:
    assert whole.returncode == 0, whole.stdout + whole.stderr
    first, *_, last = whole.stdout.splitlines()
    assert first.startswith(
        f"distckpt 0.1.0   python {environment.versions()['python']}   torch {torch.__version__}"
    )
    assert [line for line in whole.stdout.splitlines() if line[:1].isupper()][:5] == [
        "Torch",
        "Devices",
        "Launch",
        "Neighbours",
        "Replay self-test",
    ]
    assert "\n  ok    cpu " in whole.stdout
    assert " replays equal on cpu" in whole.stdout
    assert last == "Next: distckpt run train.py"


def test_the_report_is_plain_and_at_most_88_columns(whole: subprocess.CompletedProcess[str]) -> None:
    assert "\x1b" not in whole.stdout + whole.stderr
    assert max(map(len, whole.stdout.splitlines())) <= 88


def test_narration_is_not_among_the_data(whole: subprocess.CompletedProcess[str]) -> None:
    assert "replaying on" not in whole.stdout
    assert whole.stderr.startswith("distckpt doctor: replaying on cpu")


def test_every_device_type_that_is_off_has_a_reason() -> None:
    for entry in environment.devices():
        assert entry["on"] is (entry["reason"] is None), entry
    assert any(entry["type"] == "cpu" and entry["on"] for entry in environment.devices())


def test_looking_initialises_no_device() -> None:
    environment.devices()
    assert not torch.cuda.is_initialized()


def validate(found: Any, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="a dev requirement: pip install -e '.[dev]'")
    schema = json.loads((ROOT / "distckpt" / "cli" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema)


def test_json_is_all_of_standard_output_and_follows_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    validate(found, "doctor")
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert {r["status"] for r in found["ranks"][0]["results"]} == {"equal"}


def test_a_failure_is_exit_code_1_and_follows_the_schema_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = selftest.Result("cpu", "dropout", "dc.checkpoint", "differs", "gradient 0: off by up to 1.00e+00")
    monkeypatch.setattr(selftest, "run_selftests", lambda devices: [wrong])
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    validate(found, "doctor")
    assert (found["ok"], found["failures"]) == (False, 1)
    assert found["findings"]["self_test"][1]["code"] == "DC704"
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "\n  FAIL  cpu      dropout, dc.checkpoint: gradient 0: off by up to 1.00e+00  [DC704]\n" in out
    assert "\n1 failure, " in out
    assert "Next: distckpt doctor --json" in out.splitlines()[-1]


def test_the_self_test_can_be_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "run_selftests", None)
    assert main(["doctor", "--no-self-test"]) == 0
    assert "  --    left out  as asked" in capsys.readouterr().out


def test_a_device_type_that_is_not_on_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "abacus"]) == 1
    assert "nothing to test: no device of type abacus is on" in capsys.readouterr().out


def test_a_broken_launch_environment_is_a_failure_and_the_rest_is_still_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RANK set, WORLD_SIZE and MASTER_ADDR and MASTER_PORT not" in out
    assert "[DC703]" in " ".join(out.split())
    assert " replays equal on cpu" in out


def test_a_store_that_is_not_there_is_a_failure_within_the_timeout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--device", "cpu", "--timeout", "1"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "rank 1 cannot reach the store at 127.0.0.1:1" in out


def test_a_torch_xla_for_another_torch_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", {"torch-xla": "1.13"}.get)
    backend, reason = environment.why_off("xla")
    assert backend is None
    assert reason == f"torch_xla 1.13 goes with torch 1.13, and this is torch {torch.__version__}"
