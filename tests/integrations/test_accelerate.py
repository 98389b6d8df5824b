"""accelerate: regions through ``Accelerator.prepare`` and ``accelerate launch`` on two gloo ranks."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.modules import regions

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from distckpt.errors import BothSwitches
from distckpt.integrations.accelerate import DistckptPlugin
from tests.integrations.models import LAYERS, batch, build, without_cache
from tests.processes import run
from tests.ranks.spawn import ROOT, run_ranks

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """What each rank found, by kind of run."""
    pytest.importorskip("lightning", reason="the extra 'integrations' is not installed")
    return run_ranks("tests.integrations.jobs.prepare", 2)


def exact(runs: list[dict[str, Any]], name: str) -> None:
    for rank in runs:
        run = rank[name]
        assert run["regions"] == LAYERS["gpt2"]
        assert run["error"] == 0
        assert run["same"]
        assert run["same_loss"]
        assert run["same_keys"]
        assert not run["wrapped"]
        assert run["all_gathers"] == rank[name.split(",")[0]]["all_gathers"]


@needs_gloo
def test_accelerates_own_fsdp2_checkpointing_has_wrong_gradients_with_dropout_and_ours_has_none(
    runs: list[dict[str, Any]],
) -> None:
    for rank in runs:
        assert rank["fsdp2"]["kind"] == "FSDPGPT2LMHeadModel"
        theirs = rank["fsdp2, accelerate's own"]
        assert theirs["same_loss"]  # which is why nobody notices
        assert theirs["error"] > 0.1
        assert rank["fsdp2, plugin"]["error"] == 0
    exact(runs, "fsdp2, plugin")


@needs_gloo
def test_apply_before_prepare_is_exact_under_fsdp2_at_no_extra_all_gather(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["fsdp2"]["all_gathers"] > 0
    exact(runs, "fsdp2, apply before")


@needs_gloo
def test_apply_before_prepare_is_exact_under_ddp(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["ddp, apply before"]["kind"] == "DistributedDataParallel"
    exact(runs, "ddp, apply before")


@needs_gloo
def test_apply_after_prepare_is_exact_too(runs: list[dict[str, Any]]) -> None:
    exact(runs, "ddp, apply after")
    exact(runs, "fsdp2, apply after")


@needs_gloo
def test_the_plugin_reads_accelerates_switch_as_its_own(runs: list[dict[str, Any]]) -> None:
    exact(runs, "fsdp2, plugin, flag on")
    for rank in runs:
        off = rank["fsdp2, plugin, flag off"]
        assert (off["regions"], off["same"], off["wrapped"]) == (0, True, False)


@needs_gloo
def test_apply_before_fabric_setup_is_exact_under_ddp(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["fabric, apply before"]["kind"] == "DistributedDataParallel"
    assert runs[0]["fabric"]["as_accelerate"]
    exact(runs, "fabric, apply before")


@needs_gloo
def test_accelerate_launch_runs_a_script_with_regions_on_two_cpu_ranks() -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    # Not --cpu: with it, launch starts one process unless mpirun is there. Port 0 means any free one.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.integrations.jobs.launched"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(3):
        done = run(command + options, limit=240, environment=environment)
        if "in use" not in done.stderr and "EADDRINUSE" not in done.stderr:
            break  # else: somebody took the port between accelerate's choice and its use
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(part.splitlines()[0]) for part in done.stdout.split("@@report ")[1:]]
    expected = {"world": 2, "model": "DistributedDataParallel", "regions": LAYERS["gpt2"], "same": True}
    assert sorted(found, key=lambda r: r["rank"]) == [{"rank": rank, **expected} for rank in range(2)]


def plugin(**options: Any) -> DistckptPlugin:
    return DistckptPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        **options,
    )


def test_the_plugin_makes_regions_once_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_ACTIVATION_CHECKPOINTING", raising=False)
    model, ours = build("llama"), plugin()
    for _ in range(2):
        ours.set_auto_wrap_policy(model)
    assert len(regions(model)) == LAYERS["llama"]
    other = build("llama")
    plugin(globs="model.layers.0", options={"determinism_check": "bitwise"}).set_auto_wrap_policy(other)
    assert regions(other).names == ("model.layers.0",)


def test_accelerates_own_checkpointing_never_runs_under_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert plugin().activation_checkpointing is False
    assert plugin(activation_checkpointing=True).activation_checkpointing is False


def test_accelerates_offload_is_refused_by_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BothSwitches, match="activation_checkpointing_offload"):
        plugin(activation_checkpointing=True, activation_checkpointing_offload=True)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true")
    with pytest.raises(BothSwitches, match="activation_checkpointing_offload"):
        plugin()


@pytest.mark.parametrize("after", [False, True])
def test_mixed_precision_is_exact_with_regions_from_before_and_after_prepare(after: bool) -> None:
    def gradients(regions: bool) -> tuple[list[Any], int]:
        before = counters.regions
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = without_cache(build("gpt2"))
        if regions and not after:
            dc.apply(model)
        model = accelerator.prepare(model)
        if regions and after:
            dc.apply(model)
        torch.manual_seed(5)
        loss = model(**batch()).loss
        torch.manual_seed(9)
        accelerator.backward(loss)
        return [p.grad for p in model.parameters()], counters.regions - before

    AcceleratorState._reset_state(reset_partial_state=True)
    (expected, none), (got, opened) = gradients(False), gradients(True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (none, opened) == (0, LAYERS["gpt2"])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
