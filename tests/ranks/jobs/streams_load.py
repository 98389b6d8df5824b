"""Random states of one number of ranks, loaded on another; then saved again from there."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

import distckpt as dc
from distckpt.ranks.coordinator import Coordinator
from tests.ranks.jobs.streams import draw
from tests.ranks.spawn import leave, report


class Loose:
    """The coordinator's states, loaded by mesh coordinate."""

    def __init__(self, coord: Coordinator) -> None:
        self.coord = coord

    def state_dict(self) -> dict[str, Any]:
        return self.coord.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coord.load_state_dict(state, strict=False)


def main(folder: Path, saved: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    mesh = DeviceMesh("cpu", [list(range(world))], mesh_dim_names=("dp", "tp"))
    coord = Coordinator()
    torch.manual_seed(50)
    coord.streams(mesh, seed=3)
    found: dict[str, Any] = {"at": mesh.get_coordinate()}
    untouched = torch.get_rng_state()
    try:
        dcp.load({"random": coord}, checkpoint_id=folder / saved)
    except BaseException as error:  # DCP raises the ranks' errors, or its own around them
        found["refused"] = f"{type(error).__name__}: {error}"
    found["untouched"] = torch.equal(torch.get_rng_state(), untouched)
    source = torch.Generator().manual_seed(9)
    with dc.rng.register("router", source):
        dcp.load({"random": Loose(coord)}, checkpoint_id=folder / saved)
    found["next"] = draw()
    dcp.save({"random": coord}, checkpoint_id=folder / f"from-{world}")
    report(found)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
