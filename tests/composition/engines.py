"""The engines that can run a program: plain autograd, torch's, and both surfaces of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from .program import Options

_LISTS = {
    "list: mm": [torch.ops.aten.mm.default],
    "list: sin, mm, addmm": [
        torch.ops.aten.sin.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
    ],
    "list: draws": [torch.ops.aten.bernoulli.default, torch.ops.aten.rand_like.default],
    "list: nothing": [torch.ops.aten.svd.default],
}


def _alternate() -> Callable[..., Any]:
    calls = 0

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        nonlocal calls
        calls += 1
        # what a library op makes empty and fills in place (dropout's mask) cannot be kept
        made_empty = op.name().startswith(
            ("aten::empty", "aten::new_", "aten::full", "aten::ones", "aten::zeros")
        )
        return calls % 2 == 0 and not made_empty and not op._schema.is_mutable

    return policy


def _prefer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return torch_checkpoint.CheckpointPolicy.PREFER_SAVE
    return torch_checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


def _as_written(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.jit.optimized_execution(False):
            return fn(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Engine:
    """One way to run regions. ``module`` is None for plain autograd, which only calls the function.

    ``as_written``: in regions TorchScript runs functions as they are written, as it does in ours.
    """

    name: str
    module: Any
    as_written: bool = False

    @property
    def ours(self) -> bool:
        """Whether this is the ``dc`` surface, where nothing may be silently wrong."""
        return self.name == "dc"

    def session(self) -> AbstractContextManager[Any]:
        """Return a session, in which regions share one replay; only ``dc`` has them."""
        return self.module.session() if self.ours else nullcontext()

    def region(
        self,
        fn: Callable[..., Any],
        form: str,
        options: Options,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run ``fn(*args, **kwargs)`` as one region of this engine."""
        if self.as_written:
            fn = _as_written(fn)
        if self.module is None:
            return fn(*args, **kwargs)
        if options.reentrant:
            return self.module.checkpoint(
                fn, *args, use_reentrant=True, preserve_rng_state=options.preserve_rng, **kwargs
            )
        asked = self._asked(options)
        if self.ours and form == "decorator":
            return self.module.checkpoint(**asked)(fn)(*args, **kwargs)
        if self.ours and form == "apply" and isinstance(fn, nn.Module):
            root = nn.Module()
            root.block = fn
            handle = self.module.apply(root, "block", **asked)
            try:
                return fn(*args, **kwargs)
            finally:
                handle.remove()
        return self.module.checkpoint(fn, *args, use_reentrant=False, **asked, **kwargs)

    def _asked(self, options: Options) -> dict[str, Any]:
        determinism = options.determinism
        if not self.ours and determinism in ("fingerprint", "bitwise"):
            determinism = "default"
        asked: dict[str, Any] = {
            "preserve_rng_state": options.preserve_rng,
            "determinism_check": determinism,
            "early_stop": options.early_stop,
        }
        if options.selective is not None:
            asked["context_fn"] = self._contexts(options.selective)
        if options.debug and (self.ours or options.selective is None):
            asked["debug"] = True
        return asked

    def _contexts(self, selective: str) -> Callable[[], Any]:
        build = self.module.create_selective_checkpoint_contexts
        if selective == "policy: alternate":
            return lambda: build(_alternate())
        return partial(build, _prefer if selective == "policy: prefer" else _LISTS[selective])


PLAIN = Engine("plain", None)
TORCH = Engine("torch", torch_checkpoint)
PLAIN_AS_WRITTEN = Engine("plain", None, as_written=True)
TORCH_AS_WRITTEN = Engine("torch", torch_checkpoint, as_written=True)


def engine(name: str) -> Engine:
    """Return the engine called plain, torch, dc or compat."""
    if name in ("plain", "torch"):
        return PLAIN if name == "plain" else TORCH
    return Engine(name, importlib.import_module("distckpt" if name == "dc" else "distckpt.compat"))
