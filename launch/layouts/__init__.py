"""Layouts: how one model lies over the ranks, and what a training step is there."""

from __future__ import annotations

from launch.layouts.base import Layout as Layout
from launch.layouts.pipeline import Pipeline
from launch.layouts.replicas import DataParallel, Sharded
from launch.layouts.tensor import TensorParallel
from launch.options import Options
from launch.parallel import World

_LAYOUTS: dict[str, type[Layout]] = {
    "fsdp": Sharded,
    "ddp": DataParallel,
    "pp": Pipeline,
    "pp+fsdp": Pipeline,
    "tp": TensorParallel,
}


def lay_out(options: Options, mode: str, world: World) -> Layout:
    """The model of ``options``, with regions as ``mode`` says, over all ranks. Collective.

    Raises:
        BadOption: the model or the batch cannot be cut as ``--parallel`` asks.
    """
    return _LAYOUTS[options.parallel](options, mode, world)
