"""launch/train.py for ranks that are forks of one process, which has imported all of it."""

from __future__ import annotations

import sys

import plotille  # noqa: F401
import rich.table  # noqa: F401
import torch.distributed.pipelining  # noqa: F401
import tyro  # noqa: F401

from launch import compare, data, loop, parallel, state  # noqa: F401
from launch.app import run
from launch.layouts import pipeline, replicas  # noqa: F401

if __name__ == "__main__":
    sys.exit(run())
