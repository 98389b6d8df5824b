"""Halves: which nodes of a graph run in both halves of a split backward.

Note [Halves]
    Torch takes the gradients of a stage's inputs first and those of its weights later. The first half runs every node
    between outputs and inputs. The second starts again from those of them from which a way leads to a weight and not
    to an input: a linear layer runs twice, a GELU or a dropout once. What a node of the second kind has saved
    is not needed any more once it ran, though its graph lives on. (``get_param_groups`` in
    ``torch.distributed.pipelining`` finds the same nodes from the other end.) When a weight is used in two places
    torch goes all the way from one to the other, so then any node may run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import GradientEdge


class Again:
    """Tells of a node that runs in the input half whether it runs again in the weight half."""

    def __init__(
        self, outputs: Iterable[Any], inputs: Iterable[Any], weights: Iterable[torch.Tensor]
    ) -> None:
        roots = [node for out in outputs if (node := _maker(out)) is not None]
        ends = {id(t): (True, False) for t in inputs} | {id(t): (False, True) for t in weights}
        reached = _reached(roots, ends)
        starts: dict[Any, list[Any]] = {}  # of a node that runs twice, where its ways to weights begin
        for node, (inp, _) in reached.items():
            below = [n for n in _below(node) if reached[n] == (False, True)]
            if inp and below:
                starts[node] = below
        self._again = set(starts)
        users: dict[Any, int] = {}
        for below in starts.values():
            for leaf in _leaves(below):
                users[leaf] = users.get(leaf, 0) + 1
        self._any = any(count > 1 for count in users.values())

    def __call__(self, node: Any) -> bool:
        return self._any or node in self._again


def _maker(out: Any) -> Any:
    """The node that made an output, which may be given by its edge in the graph."""
    if isinstance(out, GradientEdge):
        return out.node
    return out.grad_fn if isinstance(out, torch.Tensor) else None


def _below(node: Any) -> list[Any]:
    return [edge[0] for edge in node.next_functions if edge[0] is not None]


def _reached(roots: list[Any], ends: dict[int, tuple[bool, bool]]) -> dict[Any, tuple[bool, bool]]:
    """Of every node below ``roots``: whether a way leads to an input, and whether one leads to a weight."""
    known: dict[Any, tuple[bool, bool]] = {}
    todo = list(roots)
    while todo:
        node = todo[-1]
        below = _below(node)
        missing = [n for n in below if n not in known]
        if missing and node not in known:
            todo += missing
            continue
        todo.pop()
        if node not in known:
            inp, weight = ends.get(id(getattr(node, "variable", None)), (False, False))
            known[node] = inp or any(known[n][0] for n in below), weight or any(known[n][1] for n in below)
    return known


def _leaves(nodes: list[Any]) -> set[Any]:
    """The nodes without successors below ``nodes``."""
    seen: set[Any] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += _below(node)
    return {node for node in seen if hasattr(node, "variable")}
