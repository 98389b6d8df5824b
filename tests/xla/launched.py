"""One process of a launch, for test_launch.py.

usage: launched.py torchrun xla://|env://    under torchrun's environment
       launched.py launch                    starts itself with torch_xla.launch
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.runtime as xr
from distckpt_backends.errors import DistckptError
from torch import nn

import distckpt as dc
from distckpt.ranks import Coordinator
from tests.ranks.spawn import report


def check() -> dict[str, object]:
    """What the coordinator says of this process's model, and the model's regions before and after."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("xla")
    dc.apply(model, "*")
    before = [type(m.forward).__name__ for m in model]
    try:
        Coordinator(timeout=30).check(model)
    except DistckptError as error:
        refused: str | None = type(error).__name__
        text = str(error)
    else:
        refused, text = None, ""
    ran = model(torch.ones(2, 4, device="xla")).sum().item()
    return {
        "refused": refused,
        "text": text,
        "model as before": before == [type(m.forward).__name__ for m in model] and ran == ran,
        "runtime": [xr.global_ordinal(), xr.world_size()],
        "group": [dist.get_rank(), dist.get_world_size()] if dist.is_initialized() else None,
    }


def launched(index: int) -> None:
    dist.init_process_group("xla", init_method="xla://")
    report({**check(), "index": index})


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        torch_xla.launch(launched, debug_single_process=True)
    else:
        import torch_xla.distributed.xla_backend

        init = sys.argv[2]
        dist.init_process_group("xla" if init == "xla://" else "gloo", init_method=init)
        report(check())
        sys.stdout.flush()
        os._exit(0)  # a group of one has no peers to part from, and its threads may abort at exit
