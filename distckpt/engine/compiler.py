"""Compiler: regions whose operators a compiler sees: the barrier that keeps a replay apart, and traced regions.

Note [Barrier]
    On a deferred device the whole step is one program. A replay that only depends on the region's inputs equals the
    forward, and common-subexpression elimination removes it, or the scheduler moves it up and nothing is saved. So
    the inputs of the replay go through one barrier together with the gradients that arrived at the region's outputs:
    the replay cannot exist before them. Inputs alone double the work and save no memory. The technique is
    pytorch/xla#3455 and #3486; tying to the gradients is what its FSDP does.

Note [Loops that draw]
    torch_xla's scan seeds its iterations from the device's state and from how many draws lie between the last seeding
    of the device and the loop. A replay can put the state back but not that distance, so it would draw other numbers.
    A region around such a loop is refused. A loop that draws nothing is replayed like anything else.

Note [Traced regions]
    AOTAutograd traces the layer's forward and backward into one graph and a partitioner cuts it in two, so a replay
    there would be more nodes, which are merged with the first ones. The region marks its nodes as the ones to compute
    again instead, as torch's own operator does under ``torch.compile``, and torch's partitioners obey. Random
    operators are marked as kept: the two halves of a scan are seeded apart, so a second draw would be another one.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Iterable
from typing import Any

import torch
from distckpt_backends import Backend
from torch.utils._pytree import tree_flatten, tree_unflatten

from distckpt._torch import OriginalPolicy, node_number, nodes_since
from distckpt.engine.inputs import tensors
from distckpt.engine.region import Options
from distckpt.engine.rng import Draw
from distckpt.errors import LoopDraws, ScannedDropout, ScannedRegion, UnitInsideRegion


class Tie:
    """Incoming gradients of one region, and the barrier that binds its replay to them.

    Made before the region's function runs, on its thread.

    Raises:
        UnitInsideRegion: the region runs one of torch_xla's own FSDP units.
    """

    __slots__ = ("backend", "first", "grads", "loop", "recording", "thread", "where")

    def __init__(self, backend: Backend, modules: Iterable[torch.nn.Module], where: str) -> None:
        unit = backend.unit_among(modules)
        if unit is not None:
            raise UnitInsideRegion(
                f"a region runs {unit}",
                where=where,
                why="it gathers and frees its parameters as it runs, and a replay would do so during its backward",
                fix="put the region inside: dc.apply the module first, then wrap it",
            )
        self.backend = backend
        self.where = where
        self.first = node_number()
        self.recording = True
        self.thread = threading.get_ident()
        self.loop = False  # a compiled loop was seen while the region was recorded
        self.grads: list[torch.Tensor] = []

    def refuse_loop(self, draws: list[Draw] | None, out: Any, first: int | None = None) -> None:
        """When the region has run, and drew what ``draws`` says.

        ``first`` bounds the search for the loop: an autograd node's number, by default that of the record.

        Raises:
            LoopDraws: it drew on this device and ran a compiled loop, which may have been what drew.
        """
        if not any(getattr(draw.stream, "backend", None) is self.backend for draw in draws or ()):
            return
        first = self.first if first is None else first
        if self.loop or self.backend.has_loop(nodes_since(first, tensors(out))):
            raise LoopDraws(
                "a region runs torch_xla's scan and draws random numbers",
                where=self.where,
                why="the scan would draw other numbers when it is replayed, even from the same random state",
                fix="put the region inside the layer that is scanned, or the random part outside the region",
            )

    def attach(self, out: Any) -> None:
        """Collect the gradients of the region's outputs when they arrive, before any slot is unpacked."""
        self.recording = False
        grads = self.grads

        def arrived(found: tuple[torch.Tensor | None, ...]) -> None:
            grads.extend(g for g in found if g is not None)

        nodes = dict.fromkeys(t.grad_fn for t in tensors(out) if t.grad_fn is not None)
        for node in nodes:
            node.register_prehook(arrived)

    def bind(self, fn: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
        """The same call on inputs that exist only once the gradients do.

        Every reference to a gradient is dropped: a tensor that is alive at the next step mark becomes an output
        of the program.
        """
        if self.recording and self.backend.in_loop(self.thread):
            self.loop = True  # it takes a gradient while it is traced, which replays a region around it
        grads = [g for g in self.grads if g.device.type == self.backend.device_type]
        self.grads.clear()
        leaves, spec = tree_flatten((args, kwargs))
        places = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.backend.device_type
        ]
        with torch.no_grad():
            tied = self.backend.barrier([*(leaves[i].detach() for i in places), *grads])
        for i, tensor in zip(places, tied, strict=False):
            leaves[i] = tensor.detach().requires_grad_(leaves[i].requires_grad)
        args, kwargs = tree_unflatten(leaves, spec)
        return fn, list(args), kwargs


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
