"""One rank of the resume tests: ``save PATH`` trains and saves, ``load PATH`` loads on any number of ranks."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from distckpt.ranks import Coordinator
from tests.ranks.sharded import FLAT, WIDTH, Model, by_hand
from tests.ranks.spawn import leave, report

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def build(regions: str | None = "stack.layers.*") -> tuple[Model, torch.optim.Optimizer]:
    model = Model(3)
    Coordinator(device_type="cpu").fully_shard(model, FLAT, regions=regions, mp_policy=BF16)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, WIDTH)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def fingerprint(model: Any, optimizer: torch.optim.Optimizer) -> str:
    """A hash of every bit of the whole parameters and optimizer state, the same on any number of ranks."""
    states = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    digest = hashlib.sha256()
    for state in states:
        _add(digest, state)
    return digest.hexdigest() if dist.get_rank() == 0 else ""


def _add(digest: Any, x: Any) -> None:
    if isinstance(x, dict):
        for key in sorted(x):
            digest.update(str(key).encode())
            _add(digest, x[key])
    elif isinstance(x, torch.Tensor):
        digest.update(bytes(x.detach().flatten().view(torch.uint8).tolist()))
    elif isinstance(x, list | tuple):
        for item in x:
            _add(digest, item)
    else:
        digest.update(repr(x).encode())


def save(path: str) -> dict[str, Any]:
    model, optimizer = build()
    for index in range(3):
        step(model, optimizer, 10 * index + dist.get_rank())
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=path)
    at_save = fingerprint(model, optimizer)
    step(model, optimizer, 100 + dist.get_rank())
    plain = Model(3)
    by_hand(plain, FLAT, mp_policy=BF16)
    return {
        "at save": at_save,
        "one step on": fingerprint(model, optimizer),
        "keys": list(get_model_state_dict(model))
        == list(get_model_state_dict(plain))
        == list(Model(3).state_dict()),
        "own keys": list(model.state_dict()) == list(plain.state_dict()) == list(Model(3).state_dict()),
        "local": [list(t.to_local().shape) for t in model.state_dict().values()]
        == [list(t.to_local().shape) for t in plain.state_dict().values()],
    }


def load(path: str, regions: str | None) -> dict[str, Any]:
    model, optimizer = build(regions)
    step(model, optimizer, 7)  # parameters and moments are others than the saved ones
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loaded = fingerprint(model, optimizer)
    step(model, optimizer, 100 + dist.get_rank())
    return {"loaded": loaded, "one step on": fingerprint(model, optimizer)}


def main() -> None:
    dist.init_process_group("gloo")
    what, path = sys.argv[1:]
    if what == "save":
        report(save(path))
    else:
        report({"regions": load(path, "stack.layers.*"), "none": load(path, None)})
    leave()


if __name__ == "__main__":
    main()
    os._exit(0)
