"""dc.apply and FSDP2 on the same modules, on two ranks over gloo."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, Limit, started


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_regions_sit_inside_fsdp2_whichever_was_applied_first_at_no_extra_all_gather(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
    }
    command = [sys.executable, "-m", "tests.modules.fsdp_job"]
    limit = Limit(60)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started([*command, rank, tmp_path / "store"], environment=environment, together=True)
            )
            for rank in range(2)
        ]
        codes = [rank.within(limit) for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.printed() for rank in ranks)
