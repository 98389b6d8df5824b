"""Under torchrun with one restart: in the first round rank 1 does not come to a check, and rank 0 gives up.

Argument: "group" meets through the store of a gloo group, "store" through torchrun's own, which outlives the round.
"""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist
from distckpt_backends.errors import DistckptError
from torch import nn

import distckpt as dc
from distckpt.errors import RanksMissing
from distckpt.ranks import RegionPlan
from tests.ranks.spawn import report

if sys.argv[1] == "group":
    dist.init_process_group("gloo")
coord = dc.Coordinator(timeout=100)
model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
dc.apply(model, "0")
coord.check(model)
if coord.restart == 0:
    if coord.rank == 1:
        time.sleep(300)  # until torchrun ends this process
    try:
        dc.Coordinator(timeout=1).check(model)
    except RanksMissing:  # this verdict stays in the store
        os._exit(1)
coord.check(model)
text = ""
try:
    coord.check(model, RegionPlan.of(model, world_size=3))
except DistckptError as error:
    text = str(error)
report({"rank": coord.rank, "restart": coord.restart, "launcher": coord.world.launcher, "shrunk": text})
coord.check(model)
coord.close()
if sys.argv[1] == "group":
    dist.barrier()
    dist.destroy_process_group()
