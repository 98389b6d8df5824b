"""Named streams on four ranks, whose mesh numbers them otherwise than the job does; and their states, saved."""

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
from distckpt.errors import StreamsDisagree
from distckpt.ranks.coordinator import Coordinator
from distckpt.ranks.rng_streams import STREAMS
from tests.ranks.spawn import leave, report


def draw() -> dict[str, list[float]]:
    """The next numbers of every stream."""
    found = {"default": torch.rand(3).tolist()}
    for name in STREAMS:
        with dc.rng.stream(name):
            found[name] = torch.rand(3).tolist()
    return found


def refused(call: Any, error: type[BaseException]) -> str:
    try:
        call()
    except error as e:
        return str(e)
    return "nothing was raised"


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [[3, 1], [0, 2]], mesh_dim_names=("dp", "tp"))
    coord = Coordinator()
    torch.manual_seed(100 + rank)
    found: dict[str, Any] = {"at": mesh.get_coordinate()}
    coord.streams(mesh, seed=3)
    found["checked"] = {row.name: row.groups for row in coord.check_streams()}
    found["first"] = draw()
    source = torch.Generator().manual_seed(rank)
    with dc.rng.register("router", source):
        with dc.rng.stream("tensor-parallel"):
            torch.rand(rank)  # every rank somewhere else
        torch.rand(rank + 5)
        torch.rand(2 * rank + 1, generator=source)
        value = coord.state_dict()
        found["value"] = {"version": value["version"], "world": value["world"]}
        dcp.save({"random": coord}, checkpoint_id=folder / "four")
        expected = [draw(), torch.rand(2, generator=source).tolist()]
        torch.manual_seed(0)
        source.manual_seed(0)
        coord.streams(mesh, seed=3)
        dcp.load({"random": coord}, checkpoint_id=folder / "four")
        found["restored"] = [draw(), torch.rand(2, generator=source).tolist()] == expected
        found["next"] = expected[0]
    value_bytes = value["states"]
    others: list[Any] = [None] * 4
    dist.all_gather_object(others, value_bytes)
    found["equal on all ranks"] = all(o == value_bytes for o in others)
    # A rank that draws more often than its group.
    coord.streams(mesh, seed=3)
    if rank == 1:
        with dc.rng.stream("data-parallel"):
            torch.rand(1)
    found["drifted"] = refused(coord.check_streams, StreamsDisagree)
    coord.streams(mesh, seed=3)
    with dc.rng.stream("tensor-parallel"):
        torch.manual_seed(1)
    found["reseeded"] = refused(coord.check_streams, StreamsDisagree)
    coord.streams(mesh, seed=4 if rank == 2 else 3)
    found["other seed"] = refused(coord.check_streams, StreamsDisagree)
    coord.streams(mesh, seed=3)
    if rank == 3:
        coord.streams(mesh, seed=3, streams={"router": ("dp",)})
    found["other table"] = refused(coord.check_streams, StreamsDisagree)
    report(found)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
