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
from torch.distributed.fsdp import fully_shard

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


class Broken(nn.Module):
    """A module that cannot be looked at."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such thing")


def attempt(name: str, coord: dc.Coordinator, *args: Any, **kwargs: Any) -> None:
    """Keep what a check does, and whether the model's regions are what they were."""
    looks = args and isinstance(args[0], (nn.Module, dict)) and not isinstance(args[0], Broken)
    before = RegionPlan.of(args[0]).to_json() if looks else None
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


def mesh_of(*names: str) -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


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


attempt("an error of no code on one rank", coord, None if RANK != 1 else Broken())
attempt("no mesh on one rank", coord, applied(), mesh=mesh if RANK else object())
attempt("no model on one rank", coord, applied() if RANK != 2 else "model")


def parts(**changes: Any) -> nn.Module:
    """A model, one of whose parts is made otherwise on rank 2."""
    here = changes if RANK == 2 else {}
    width, dtype, kind = here.get("width", 4), here.get("dtype", torch.float32), here.get("kind", nn.ReLU)
    inner = nn.Sequential(nn.Linear(4, width, dtype=dtype), kind(), nn.Dropout(here.get("p", 0.1)))
    made = nn.Sequential(nn.Linear(4, 4), inner, *here.get("more", []))
    inner.requires_grad_(not here.get("frozen", False))
    inner.train(not here.get("eval", False))
    dc.apply(made, "1")
    return made


attempt("model, width", coord, parts(width=8))
attempt("model, dtype", coord, parts(dtype=torch.bfloat16))
attempt("model, class", coord, parts(kind=nn.GELU))
attempt("model, frozen", coord, parts(frozen=True))
attempt("model, eval", coord, parts(eval=True))
attempt("model, dropout", coord, parts(p=0.2))
attempt("model, one block more", coord, parts(more=[nn.Linear(4, 4)]))
attempt("model, width along dp", coord, parts(width=8), mesh=mesh_of("dp", "tp"))
attempt("model, frozen along tp", coord, parts(frozen=True), mesh=mesh_of("dp", "tp"))
attempt("model, width in a stage", coord, parts(width=8), stage=RANK // 2)


def frozen() -> nn.Module:
    made = parts()
    made[0].requires_grad_(False)
    return made


def by_hand(coordinate: int) -> nn.Module:
    """Rows of a plain parameter, divided unevenly."""
    return nn.Sequential(nn.Linear(4, 3 + coordinate), nn.ReLU())


def fsdp1() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    made = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)))
    made[1] = FullyShardedDataParallel(made[1], use_orig_params=True, device_id=torch.device("cpu"))
    return FullyShardedDataParallel(made, use_orig_params=True, device_id=torch.device("cpu"))


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(
        nn.Sequential(nn.Linear(4, 6)), mesh_of("dp", "tp")["tp"], {"0": ColwiseParallel()}
    )


attempt("frozen everywhere", coord, frozen())
attempt("on meta", coord, parts().to("meta"))
attempt("on meta on one rank", coord, parts().to("meta" if RANK == 1 else "cpu"))
attempt("other widths in other stages", coord, by_hand(RANK // 2), stage=RANK // 2)
attempt("other widths along tp", coord, by_hand(RANK % 2), mesh=mesh_of("dp", "tp"))
attempt("other widths in other stages of a mesh", coord, by_hand(RANK // 2), mesh=mesh_of("pp", "dp"))
attempt("other experts along ep", coord, parts(kind=nn.GELU), mesh=mesh_of("dp", "ep"))
attempt("uninitialized", coord, nn.Sequential(nn.LazyLinear(4)))
attempt("fsdp2", coord, fully_shard(nn.Linear(3, 5)))
attempt("hsdp", coord, fully_shard(nn.Linear(3, 5), mesh=mesh_of("dp_replicate", "dp_shard")))
attempt("fsdp1", coord, fsdp1())
attempt("tensor parallel", coord, tensor_parallel())
attempt("ddp", coord, nn.parallel.DistributedDataParallel(parts()))
attempt("compiled on one rank", coord, torch.compile(parts()) if RANK == 1 else parts())

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
