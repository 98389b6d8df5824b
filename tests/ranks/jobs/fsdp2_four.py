"""One of four ranks: a mesh of two dimensions, and resharding to two of the four."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from distckpt._torch_dist import UNITS_IN_REPLAYS
from distckpt.ranks import Coordinator
from tests.ranks.sharded import FLAT, NESTED, Model, by_hand, compare, train
from tests.ranks.spawn import leave, report


def tensor_parallel(mesh: Any) -> Model:
    """Linear layers over the second dimension of the mesh; units over the first follow."""
    model = Model(3)
    column = ColwiseParallel(output_layouts=Replicate())
    for layer in model.stack.layers:
        parallelize_module(layer, mesh, {"attn.up": column, "mlp": column})
    return model


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    coord = Coordinator(device_type="cpu")
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "hsdp": (FLAT, {"mesh": grid, "mp_policy": bf16}),
        "hsdp, nested": (NESTED, {"mesh": grid}),
        "reshard to two": (FLAT, {"reshard_after_forward": 2}),
        "reshard to two, nested": (NESTED, {"reshard_after_forward": 2}),
    }
    found: dict[str, Any] = {}
    for name, (units, options) in cases.items():
        if units is NESTED and not UNITS_IN_REPLAYS:
            continue
        plain = Model(3)
        by_hand(plain, units, **options)
        ours = Model(3)
        coord.fully_shard(ours, units, regions="stack.layers.*", **options)
        found[name] = compare(train(ours), train(plain))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plain = tensor_parallel(both["tensor"])
    by_hand(plain, FLAT, mesh=both["data"])
    ours = tensor_parallel(both["tensor"])
    coord.fully_shard(ours, "stack.layers.*", mesh=both["data"])
    found["tensor parallel"] = compare(train(ours), train(plain))
    report(found)
    leave()


if __name__ == "__main__":
    main()
    os._exit(0)
