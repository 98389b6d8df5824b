"""Three ranks: rank 2 dies before a check, or comes too late; argument: "dies" or "late"."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist
from distckpt_backends.errors import DistckptError

import distckpt as dc
from tests.ranks.spawn import report

dist.init_process_group("gloo")
RANK = dist.get_rank()
coord = dc.Coordinator(timeout=2, alarm=False)
coord.check()
if RANK == 2:
    if sys.argv[1] == "dies":
        os._exit(3)
    time.sleep(5)
start = time.monotonic()
try:
    coord.check()
except DistckptError as error:
    report({"class": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start})
sys.stdout.flush()
if RANK != 2:
    time.sleep(3.5)  # gloo's threads may abort when a peer is gone first
os._exit(0)
