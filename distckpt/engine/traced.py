"""Traced: a region inside a graph that a compiler traces on a deferred device, such as a layer of torch_xla's scan.

Note [Traced regions]
    AOTAutograd traces the layer's forward and backward into one graph and a partitioner cuts it in two, so a replay
    there would be more nodes, which are merged with the first ones. The region marks its nodes as the ones to compute
    again instead, as torch's own operator does under ``torch.compile``, and torch's partitioners obey. Random
    operators are marked as kept: the two halves of a scan are seeded apart, so a second draw would be another one.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch

from distckpt._torch import OriginalPolicy
from distckpt.engine.options import Options
from distckpt.errors import ScannedDropout, ScannedRegion

_ids = itertools.count(1)  # one per region: a partitioner keeps what lies between two regions

_NEEDS_REPLAY = {"context_fn": (None,), "debug": (False,), "determinism_check": ("default", "none")}


class Traced:
    """The nodes that one region adds to a graph.

    Raises:
        ScannedRegion: an option that only a replay could honour.
    """

    __slots__ = ("graph", "last", "where")

    def __init__(self, graph: Any, options: Options, where: str) -> None:
        refused = [name for name, plain in _NEEDS_REPLAY.items() if getattr(options, name) not in plain]
        if refused:
            raise ScannedRegion(
                f"a region in a traced graph cannot honour {', '.join(refused)}",
                where=where,
                why="the compiler recomputes there, and nothing is replayed that could be selected, logged or compared",
                fix="leave the option out for layers that torch_xla's scan runs",
            )
        self.graph = graph
        self.last = next(iter(reversed(graph.nodes)), None)
        self.where = where

    def seal(self, pins: Any) -> None:
        """Mark every node that the region added.

        Raises:
            ScannedRegion: the region pinned a value.
            ScannedDropout: the region draws by the fused dropout operator, whose mask scan cannot carry.
        """
        if pins:
            raise ScannedRegion(
                "a region in a traced graph cannot pin a value",
                where=self.where,
                why="nothing is replayed there, so there is no moment to hand it out again",
                fix="compute the value outside the region",
            )
        region = next(_ids)
        node = next(iter(self.graph.nodes)) if self.last is None else self.last.next
        while node.op != "root":
            if node.op == "call_function":
                if node.target is torch.ops.aten.native_dropout.default:
                    raise self._dropout()
                node.meta["ac_graph_id"] = region
                node.meta["recompute"] = (
                    OriginalPolicy.MUST_SAVE if _is_drawn(node) else OriginalPolicy.PREFER_RECOMPUTE
                )
            node = node.next

    def _dropout(self) -> ScannedDropout:
        return ScannedDropout(
            "dropout in a layer that torch_xla's scan runs",
            where=self.where,
            why="scan cannot carry the mask of native_dropout, and drawing it again would give another one",
            fix="multiply by torch.bernoulli(torch.full_like(x, 1 - p)) / (1 - p), or run the layers without scan",
        )


def _is_drawn(node: Any) -> bool:
    if node.target is operator.getitem:
        node = node.args[0]
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
