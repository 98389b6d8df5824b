"""TorchScript inside a region.

Note [TorchScript]
    TorchScript runs a function as it is written the first time, and an optimised graph of it later, which saves other
    tensors. A record and its replay must be the same, so both ask for the function as it is written. A graph that was
    optimised before stays in use: then both run that. What is left is a function that was optimised between record
    and replay, by calls outside of regions. An optimised graph is one autograd node. So in a thread that has run
    TorchScript a region counts those that its record made, and its replay runs to its end and must make as many.
    Other nodes are not compared: a pin or a name that ``compat`` reads live makes others in an exact replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distckpt.engine.inputs import tensors
from distckpt.errors import ScriptMismatch


def optimised_graphs(out: Any, inputs: Iterable[torch.Tensor]) -> int:
    """How many optimised graphs TorchScript ran between ``inputs`` and the tensors in ``out``."""
    seen: set[Any] = {None, *(t.grad_fn for t in inputs)}
    waiting: list[Any] = [t.grad_fn for t in tensors(out)]
    count = 0
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            count += node.name().endswith("DifferentiableGraphBackward")
            waiting += [below for below, _ in node.next_functions]
    return count


def optimised(where: str) -> ScriptMismatch:
    """The error for a replay that ran other graphs than the record."""
    return ScriptMismatch(
        "TorchScript ran another graph in the replay of a region than in its forward",
        where=where,
        why="it optimised a scripted function between the two, and the optimised graph saves other tensors",
        fix="run the scripted function twice before its first use in a region, or put "
        "torch.jit.optimized_execution(False) around the step",
    )
