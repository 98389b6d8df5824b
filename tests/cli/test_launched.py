"""How the launch environment is read: torchrun's variables, SLURM's and PJRT's."""

from __future__ import annotations

import pytest

from distckpt.cli.environment import Place, launch_findings, place
from distckpt.errors import BadEnvironment

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_torchruns_environment_is_a_place() -> None:
    assert place(TORCHRUN) == Place(rank=1, size=4, local=1, address="node0", port=29500)
    assert place(without("LOCAL_RANK")).local == 1


def test_no_torchrun_environment_is_one_process_and_the_fix_is_said() -> None:
    assert place({}) == Place()
    (found,) = launch_findings({}, {}, None)
    assert (found.status, found.subject) == ("off", "torchrun")
    assert found.text == "one process, no torchrun environment"
    assert found.fix == "for ranks: torchrun --nproc_per_node 2 -m distckpt doctor"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "RANK set, WORLD_SIZE and MASTER_ADDR and MASTER_PORT not"),
        (without("MASTER_ADDR"), "MASTER_ADDR not"),
        (without("RANK"), "RANK not"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', not a number"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
    ],
)
def test_a_broken_environment_is_a_failure_with_its_fix(environment: dict[str, str], words: str) -> None:
    with pytest.raises(BadEnvironment) as error:
        place(environment)
    assert words in str(error.value)
    (found,) = launch_findings(environment, {}, None)
    assert (found.status, found.code) == ("fail", "DC703")
    assert found.fix is not None
    assert "torchrun" in found.fix


def test_more_local_ranks_than_devices_is_a_failure() -> None:
    assert [f.status for f in launch_findings(TORCHRUN, {"cuda": 2}, None)] == ["ok"]
    assert [f.status for f in launch_findings(TORCHRUN, {"cuda": 1}, None)] == ["ok", "fail"]


def test_slurm_tasks_without_torchrun_would_train_alone() -> None:
    assert [f.subject for f in launch_findings({"SLURM_NTASKS": "4"}, {}, None)] == ["torchrun", "slurm"]
    assert [f.subject for f in launch_findings({"SLURM_NTASKS": "1"}, {}, None)] == ["torchrun"]
    assert [f.subject for f in launch_findings({"SLURM_NTASKS": "4", **TORCHRUN}, {}, None)] == ["torchrun"]


@pytest.mark.parametrize(
    ("device", "xla", "status"),
    [("TPU", None, "warn"), (None, "2.9.0", "warn"), ("CPU", "2.9.0", "ok"), (None, None, None)],
)
def test_pjrt_and_torch_xla_must_go_together(device: str | None, xla: str | None, status: str | None) -> None:
    found = launch_findings({"PJRT_DEVICE": device} if device else {}, {}, xla)
    assert [f.status for f in found if f.subject == "xla"] == ([status] if status else [])
