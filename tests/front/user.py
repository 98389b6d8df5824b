# What a user writes, as a type checker sees it. "# error" marks the lines that it must refuse, and no other.
from typing import Any

import torch
from torch import nn

import distckpt as dc


def block(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return x.sin() * scale


@dc.checkpoint(determinism_check="bitwise", name="half")
def half(x: torch.Tensor, *, by: int) -> tuple[torch.Tensor, int]:
    return x / by, by


class Block(nn.Module):
    @dc.checkpoint()
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def policy(ctx: dc.SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> dc.CheckpointPolicy:
    return dc.CheckpointPolicy.MUST_SAVE


def right(model: nn.Module, x: torch.Tensor) -> None:
    y: torch.Tensor = dc.checkpoint(block, x, scale=2.0, use_reentrant=False)
    pair: tuple[torch.Tensor, int] = half(y, by=2)
    index: torch.Tensor = dc.pin(pair[0])
    handle: dc.Applied = dc.apply(model, Block, use_reentrant=False)
    dc.apply(model, "layers.*", determinism_check="fingerprint")
    dc.apply(model, ("a", "b.*"))
    dc.apply(model, lambda name, module: name.endswith("mlp"))
    dc.apply(model, list(model.children()))
    handle.remove()
    with dc.session() as session:
        kept: dc.Session = session
        kept.replay()
    with dc.rng.stream("tensor-parallel"):
        dc.rng.register("router", torch.Generator())
    try:
        dc.Coordinator("cpu").check(model)
    except dc.errors.MixedDeviceTypes as error:
        print(error.code)
    except (dc.CheckpointError, dc.DistckptError):
        raise
    print(dc.__version__, index, dc.compat.checkpoint, dc.devices.rule)


def wrong(model: nn.Module, x: torch.Tensor) -> None:
    dc.chekpoint(block, x)  # error
    dc.checkpoint(block, x, determinism_check="bitwize")  # error
    dc.checkpoint(block, x, name=3)  # error
    dc.checkpoint(determinism_check="bitwize")  # error
    dc.checkpoint(erly_stop=True)  # error
    text: str = dc.checkpoint(block, x)  # error
    half(x, 2)  # error
    half(x, by="2")  # error
    number: int = half(x, by=2)  # error
    word: str = dc.pin(x)  # error
    dc.apply(model, "layers.*", preserve_rng=True)  # error
    dc.apply(model, 3)  # error
    dc.apply("layers.*", model)  # error
    Block().inner()  # error
    dc.rng.steam("tensor-parallel")  # error
    try:
        print(text, number, word)
    except dc.MixedDeviceTypes:  # error
        pass
