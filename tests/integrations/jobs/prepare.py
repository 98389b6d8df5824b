"""One rank: ``Accelerator.prepare`` with FSDP2 and DDP, and Lightning Fabric; gradients with and without regions."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distckpt as dc
from distckpt.engine.stats import counters
from tests.integrations.models import batch, build, without_cache
from tests.ranks.spawn import leave, report

RANK = int(os.environ["RANK"])


class AllGathers(TorchDispatchMode):
    """Counts the all-gathers under it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.namespace in ("c10d", "_c10d_functional") and "gather" in op._opname
        return op(*args, **(kwargs or {}))


def step(model: Any, backward: Any) -> dict[str, Any]:
    """Loss, all gradients as one vector, regions opened, all-gathers."""
    regions = counters.regions
    torch.manual_seed(7 + RANK)
    with AllGathers() as gathers:
        loss = model(**batch(seed=RANK)).loss
        torch.manual_seed(99)  # a replay that leaned on the current random state would show
        backward(loss)
    gradients = [
        getattr(p.grad, "full_tensor", lambda g=p.grad: g)().flatten()
        for p in model.parameters()
        if p.grad is not None
    ]
    return {
        "loss": loss.detach(),
        "gradient": torch.cat(gradients),
        "regions": counters.regions - regions,
        "all_gathers": gathers.count,
        "keys": [name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()],
        "wrapped": any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules()),
    }


def accelerated(plugin: Any = None, before: bool = False, after: bool = False) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        # accelerate gives DDP on the CPU whatever plugin it is handed; its FSDP path itself works there.
        accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    model = without_cache(build("gpt2"))
    if before:
        dc.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if after:
        dc.apply(model)
    model.train()
    result = step(model, accelerator.backward)
    result["kind"] = type(model).__name__
    return result


def fabric(before: bool) -> dict[str, Any]:
    from lightning.fabric import Fabric

    model = without_cache(build("gpt2"))
    if before:
        dc.apply(model)
    lightning = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    lightning.launch()
    model = lightning.setup(model)
    model.train()
    result = step(model, lightning.backward)
    result["kind"] = type(model._forward_module).__name__
    return result


def fsdp(kind: type, **options: Any) -> Any:
    return kind(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
        **options,
    )


def main() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin as Theirs

    from distckpt.integrations.accelerate import DistckptPlugin as Ours

    torch.set_num_threads(1)
    runs = {
        "ddp": accelerated(),
        "ddp, apply before": accelerated(before=True),
        "fsdp2": accelerated(fsdp(Theirs)),
        "fsdp2, accelerate's own": accelerated(fsdp(Theirs, activation_checkpointing=True)),
        "fsdp2, plugin": accelerated(fsdp(Ours)),
        "fsdp2, plugin, flag on": accelerated(fsdp(Ours, activation_checkpointing=True)),
        "fsdp2, plugin, flag off": accelerated(fsdp(Ours, activation_checkpointing=False)),
        "fsdp2, apply after": accelerated(fsdp(Theirs), after=True),
        "ddp, apply after": accelerated(after=True),
        "fsdp2, apply before": accelerated(fsdp(Theirs), before=True),
        "fabric": fabric(before=False),
        "fabric, apply before": fabric(before=True),
    }
    runs["fabric"]["as_accelerate"] = torch.equal(runs["fabric"]["gradient"], runs["ddp"]["gradient"])
    for name, run in runs.items():
        base = runs[name.split(",")[0]]
        difference = run["gradient"] - base["gradient"]
        run["error"] = float(difference.norm() / base["gradient"].norm())
        run["same"] = torch.equal(run["gradient"], base["gradient"])
        run["same_loss"] = torch.equal(run["loss"], base["loss"])
        run["same_keys"] = run["keys"] == base["keys"]
    for run in runs.values():
        for key in ("loss", "gradient", "keys"):
            del run[key]
    report(runs)
    leave()


if __name__ == "__main__":
    main()
