"""TorchScript inside a region.

Note [TorchScript]
    TorchScript runs a function as it is written the first time, and an optimised graph of it later, which saves other
    tensors. A record and its replay must be the same, so both ask for the function as it is written. A graph that was
    optimised before stays in use: then both run that. What is left is a function that was optimised between record
    and replay, by calls outside of regions. So in a thread that has run TorchScript a region remembers what autograd
    nodes its record made, and its replay runs to its end and must make the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from distckpt.engine.errors import ScriptMismatch
from distckpt.engine.inputs import tensors


def nodes(out: Any, inputs: Iterable[torch.Tensor]) -> Counter[str]:
    """Names of the autograd nodes between ``inputs`` and the tensors in ``out``, with how many there are of each.

    Aliases left out: a tensor subclass makes them where ``__torch_function__`` is on, and in a backward it is off.
    """
    seen: set[Any] = {None, *(t.grad_fn for t in inputs)}
    waiting: list[Any] = [t.grad_fn for t in tensors(out)]
    names: Counter[str] = Counter()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if not node.name().startswith("AliasBackward"):
                names[node.name()] += 1
            waiting += [below for below, _ in node.next_functions]
    return names


def optimised(where: str) -> ScriptMismatch:
    """The error for a replay that made other nodes than the record."""
    return ScriptMismatch(
        "TorchScript ran another graph in the replay of a region than in its forward",
        where=where,
        why="it optimised a scripted function between the two, and the optimised graph saves other tensors",
        fix="run the scripted function twice before its first use in a region, or put "
        "torch.jit.optimized_execution(False) around the step",
    )
