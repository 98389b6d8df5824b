"""Four ranks agree, and disagree in every way there is; each reports what it got."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from distckpt_backends.errors import DistckptError
from torch import nn

import distckpt as dc
from distckpt.ranks import RegionPlan
from tests.ranks.spawn import leave, report

dist.init_process_group("gloo")
RANK = dist.get_rank()
found: dict[str, Any] = {}


def model(layers: int = 3) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(layers)])


def applied(globs: Any = "*", **options: Any) -> nn.Module:
    made = model()
    dc.apply(made, globs, **options)
    return made


def attempt(name: str, coord: dc.Coordinator, *args: Any, **kwargs: Any) -> None:
    """Keep what a check does, and whether the model's regions are what they were."""
    before = RegionPlan.of(args[0]).to_json() if args and args[0] is not None else None
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: Any = coord.check(*args, **kwargs).to_json()
        except DistckptError as error:
            result = {"class": type(error).__name__, "code": error.code, "text": str(error)}
    after = RegionPlan.of(args[0]).to_json() if before is not None else None
    found[name] = {
        "result": result,
        "seconds": time.monotonic() - start,
        "untouched": before == after,
        "warnings": [str(w.message) for w in caught],
    }


coord = dc.Coordinator(alarm=False)
found["world"] = [coord.rank, coord.world_size, coord.restart, coord.world.launcher]
attempt("equal", coord, applied())
attempt("nothing", coord)
attempt("glob differs", coord, applied("*" if RANK != 2 else ["0", "2"]))
attempt("option differs", coord, applied(determinism_check="bitwise" if RANK == 1 else "default"))
attempt("again after an error", coord, applied())
attempt("stages free", coord, applied(str(RANK // 2)), stage=RANK // 2)
attempt("differs inside a stage", coord, applied("0" if RANK < 3 else "1"), stage=RANK // 2)
attempt("interleaved", coord, {RANK // 2: applied(str(RANK // 2)), 2 + RANK // 2: applied("*")})
attempt("a stage nobody has", coord, applied(), stage=RANK // 2 * 2)

mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
attempt("mesh with stages", coord, applied(str(RANK // 2)), mesh=mesh)
attempt("mesh, tensor parallel differs", coord, applied(str(RANK % 2)), mesh=mesh)
attempt("mesh without names", coord, applied(), mesh=dist.device_mesh.init_device_mesh("cpu", (4,)))

with contextlib.ExitStack() as stack:
    if RANK == 3:
        stack.enter_context(dc.rng.register("router", torch.Generator()))
    attempt("a stream more", coord, applied())

two = RegionPlan.of({0: applied("0"), 1: applied("1")})
attempt("plan met", coord, applied(str(RANK // 2)), two, stage=RANK // 2)
attempt("plan met as JSON", coord, applied(str(RANK // 2)), two.to_json(), stage=RANK // 2)
attempt("plan not met on one rank", coord, applied("0" if RANK != 3 else "2"), RegionPlan.of(applied("0")))
attempt("stage missing from the plan", coord, applied(str(min(RANK, 1))), two, stage=min(RANK, 2))
attempt("another plan passed", coord, applied("0"), two if RANK else RegionPlan.of(applied("0")))
attempt("plan for another world", coord, applied("0"), RegionPlan.of(applied("0"), world_size=8))
attempt("bad plan on one rank", coord, applied("0"), RegionPlan.of(applied("0")) if RANK else "{}")

attempt("device types", dc.Coordinator("cpu" if RANK else "cuda", alarm=False), applied())
for rule in ("warn", "all"):
    other = dc.Coordinator("cpu" if RANK else "cuda", rule=rule, alarm=False)
    attempt(f"device types, {rule}", other, applied())
attempt("an unknown device", dc.Coordinator("cpu" if RANK else "abacus", alarm=False), applied())
attempt("fixed world", dc.Coordinator(world_size=8, alarm=False), applied())
attempt("rules differ", dc.Coordinator(rule="all" if RANK == 2 else "error", alarm=False), applied())
real = dc.__version__
dc.__version__ = real if RANK != 1 else "9.9"
attempt("versions differ", coord, applied())
dc.__version__ = real
attempt("equal at the end", coord, applied())

store = dist.distributed_c10d._get_default_store()
dist.barrier()
found["keys left"] = None
if RANK == 0:
    inner = store.underlying_store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if hasattr(inner, "list_keys"):
        found["keys left"] = [key for key in inner.list_keys() if "distckpt" in str(key)]
json.dumps(found)
report(found)
leave()
