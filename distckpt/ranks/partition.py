"""Partition: a region keeps 1/t of its inputs on each of t ranks, and gathers them for its replay.

The idea is that of Megatron-LM's distributed saved activations (Korthikanti et al. 2022, arXiv 2205.05198), for every
tensor input instead of the first, sizes that do not divide, and a gather that is under way before it is needed.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from distckpt_backends import get

from distckpt._torch import make_saved_tensor, without_dispatch_modes
from distckpt._torch_dist import all_gather, group_device_types, plain_part
from distckpt.engine.inputs import Packed, own, tensors
from distckpt.engine.verify import checksum
from distckpt.errors import BadPartition, InputsDiffer
from distckpt.ranks.sharded_inputs import Piece, ShardedInputs, form_digest, piece

CHECKS = ("first", "always", "leave", "never")


@dataclasses.dataclass
class Counts:
    """Totals of one partition on this rank. ``whole`` are the bytes that its regions would have kept without it,
    ``kept`` those that they kept (padding included); ``checks`` counts the collectives of the digest check."""

    regions: int = 0
    tensors: int = 0
    whole: int = 0
    kept: int = 0
    gathers: int = 0
    prefetched: int = 0
    dropped: int = 0
    checks: int = 0


class _Chosen(NamedTuple):
    """An input to divide: ``part`` is the plain tensor in ``whole``, which ``make`` makes of it again."""

    piece: Piece
    whole: torch.Tensor
    part: torch.Tensor
    make: Callable[[torch.Tensor], torch.Tensor] | None


class Partition:
    """Keeps 1/t of regions' inputs per rank of a group: pass it to ``dc.checkpoint`` or ``dc.apply`` as ``partition=``.

    For inputs that are equal on every rank of the group, as between the blocks of a tensor-parallel model. Make
    one per group and keep it. ShardedInputs whole are parameters, tensors below ``min_bytes``, DTensors that are not
    replicated over the group (they are divided already), and tensors with overlapping elements. The ranks of a
    group must record and replay the same regions in the same order, one backward at a time.

    Args:
        group: a process group, or a ``DeviceMesh`` of one dim (``mesh["tp"]``).
        min_bytes: smaller tensors are kept whole; the same on every rank.
        prefetch: start the gather of the region recorded before the one that is replayed.
        check: whether digests of the inputs are compared over the group: ``"first"``, at the first call of each
            function or module for each form of its inputs; ``"always"``, at every call; ``"leave"``, at every call,
            and inputs that differ are kept whole instead of being an error; ``"never"``.

    Attributes:
        counts: :class:`Counts`.

    Raises:
        BadPartition: not a group of this rank, or a bad option (DC460). In a region: inputs on two devices, or on one
            whose operators are compiled later.
        InputsDiffer: in a region, when checked inputs differ over the group (DC461).
        InputChanged: in a replay, when a partitioned input was changed in place since and still lives (DC111).
        GatherMismatch: in a replay, when the ranks gather different regions (DC462).
    """

    def __init__(
        self, group: Any, *, min_bytes: int = 65536, prefetch: bool = True, check: str = "first"
    ) -> None:
        if check not in CHECKS or type(min_bytes) is not int or min_bytes < 0 or type(prefetch) is not bool:
            raise BadPartition(
                f"a partition cannot have check={check!r}, min_bytes={min_bytes!r}, prefetch={prefetch!r}",
                fix=f"check is one of {', '.join(map(repr, CHECKS))}, min_bytes a number of bytes, prefetch a bool",
            )
        self.group = _group(group)
        self.ranks = dist.get_process_group_ranks(self.group)
        self.size = len(self.ranks)
        self.device_types = group_device_types(self.group)
        self.rank = dist.get_rank(self.group)
        self.min_bytes, self.prefetch, self.check = min_bytes, prefetch, check
        self.counts = Counts()
        self._thread = threading.local()
        self.recorded = 0  # regions so far; the same on every rank
        self._ahead: weakref.ref[ShardedInputs] | None = None
        self._seen: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        # Part of a region plan, which ranks compare: settings that differ would divide the inputs differently.
        how = f"min_bytes={self.min_bytes}, prefetch={self.prefetch}, check={self.check!r}"
        return f"Partition(over {self.size} ranks, {how})"

    def __deepcopy__(self, memo: Any) -> Partition:
        return self  # a copied model's regions use the same group

    def __reduce__(self) -> Any:
        raise BadPartition(
            "a partition cannot be pickled, nor a model whose regions have one",
            why="its process group exists in this job only",
            fix="remove() the regions, pickle the model, and put regions on the loaded one",
        )

    # What the engine asks ----------------------------------------------------------------------------------

    def own(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any], dict[str, Any] | None]:
        """A region's function and arguments as it keeps them; see :func:`distckpt.engine.inputs.own`."""
        owned = (fn if type(fn) is partial else None, args, kwargs)
        chosen = self._choose(owned)
        if self.size > 1 and self.check != "never":
            chosen = self._checked(fn, chosen)
        if not chosen:
            return _own_all(fn, args, kwargs, None)
        pieces = [c.piece for c in chosen]
        kept = ShardedInputs(self, pieces, [c.part for c in chosen])
        places = {id(c.whole): i for i, c in enumerate(chosen)}

        makers = [c.make for c in chosen]  # without the tensors themselves

        def keep(t: torch.Tensor) -> Any:
            i = places.get(id(t))
            if i is None:
                return make_saved_tensor(t, False)
            make = makers[i]
            return kept.part(i) if make is None else Packed([kept.part(i)], lambda parts: make(parts[0]))

        self.recorded += 1
        self.counts.regions += 1
        self.counts.tensors += len(pieces)
        self.counts.whole += sum(p.nbytes for p in pieces)
        self.counts.kept += kept.size
        return _own_all(fn, args, kwargs, keep)

    def _choose(self, owned: Any) -> list[_Chosen]:
        """The inputs to divide, each once, in call order, and where they lie."""
        chosen: list[_Chosen] = []
        if self.size == 1:
            return chosen
        end, seen = 0, set()
        for t in tensors(owned):
            if id(t) in seen or isinstance(t, torch.nn.Parameter):
                continue
            seen.add(id(t))
            plain = (t, None) if type(t) is torch.Tensor else plain_part(t, self.ranks)
            if plain is None or plain[0].numel() * plain[0].element_size() < self.min_bytes:
                continue
            found = piece(plain[0], end)
            if found is not None:
                chosen.append(_Chosen(found, t, *plain))
                end = found.end
        if chosen:
            _one_eager_device([c.part for c in chosen], self.device_types)
        return chosen

    # The check -----------------------------------------------------------------------------------------------

    def _checked(self, fn: Any, chosen: list[_Chosen]) -> list[_Chosen]:
        form = form_digest([c.piece for c in chosen])
        seen = self._seen.setdefault(_site(fn), set()) if self.check == "first" else set()
        if form in seen:
            return chosen
        # Also with nothing to divide: another rank may have something, and would wait here.
        kind = "cpu" if "cpu" in self.device_types else self.device_types[0]
        with torch.no_grad(), without_dispatch_modes():
            sums = torch.empty(len(chosen), dtype=torch.int64, device=get(kind).current_device())
            for place, c in zip(sums, chosen, strict=True):
                place.copy_(checksum(c.part.detach()))
        # One of a fixed size first: ranks with other numbers of inputs must not meet in a collective of that size.
        rows = self._gathered(torch.stack([sums.new_tensor(form), checksum(sums)]))
        apart = [i for i, row in enumerate(rows) if row[0] != rows[0][0]]
        if apart:
            raise InputsDiffer(
                f"the inputs of a region have another form on rank {self.ranks[apart[0]]} than on rank {self.ranks[0]}",
                why=f"here {[(c.piece.size, str(c.piece.dtype)) for c in chosen]}; shapes, dtypes, strides and their "
                "order must be equal over the group of a partition",
                fix="leave partition= out of this region",
            )
        if all(row == rows[0] for row in rows):
            seen.add(form)
            return chosen
        rows = self._gathered(sums)
        differ = [i for i in range(len(chosen)) if any(row[i] != rows[0][i] for row in rows)]
        if self.check == "leave":
            return self._choose([c.whole for i, c in enumerate(chosen) if i not in differ])
        i = differ[0]
        rank = next(r for r, row in enumerate(rows) if row[i] != rows[0][i])
        raise InputsDiffer(
            f"input {i} of a region, {chosen[i].piece.dtype} of shape {chosen[i].piece.size}, has other values on rank "
            f"{self.ranks[rank]} than on rank {self.ranks[0]}",
            why="a partition keeps a part of each input per rank, so every rank must have the same",
            fix='sequence-parallel inputs are divided already: leave partition= out, or use check="leave"',
        )

    def _gathered(self, values: torch.Tensor) -> list[list[int]]:
        self.counts.checks += 1
        found = torch.empty((self.size, len(values)), dtype=values.dtype, device=values.device)
        all_gather(found.view(-1), values, self.group)
        return found.tolist()

    # What was recorded last, and whose gather is ahead -------------------------------------------------------

    def last_recorded(self, inputs: ShardedInputs) -> weakref.ref[ShardedInputs] | None:
        """The record before this one on this thread."""
        before = getattr(self._thread, "last", None)
        self._thread.last = weakref.ref(inputs)
        return before

    def gather_ahead(self, inputs: ShardedInputs) -> None:
        """``inputs`` are about to be gathered ahead; drop another one that still is."""
        other = None if self._ahead is None else self._ahead()
        if other is not None and other is not inputs:
            other.drop()
        self._ahead = weakref.ref(inputs)


def _own_all(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Any
) -> tuple[Any, list[Any], dict[str, Any] | None]:
    return (
        own(fn, keep) if type(fn) is partial else fn,
        [own(a, keep) for a in args],
        own(kwargs, keep) if kwargs else None,
    )


def _group(group: Any) -> Any:
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise BadPartition(
                f"a partition needs a mesh of one dim, and this one has {group.ndim}",
                fix='take one of its dims: mesh["tp"]',
            )
        group = group.get_group()
    known = dist.is_available() and isinstance(group, dist.ProcessGroup)
    if not known or dist.get_rank(group) < 0:
        raise BadPartition(
            f"a partition needs a process group that this rank is in, not {group!r}",
            fix='pass a group, or a mesh of one dim such as mesh["tp"]',
        )
    return group


def _one_eager_device(chosen: list[torch.Tensor], device_types: tuple[str, ...]) -> None:
    devices = sorted({str(t.device) for t in chosen})
    if len(devices) > 1:
        raise BadPartition(
            f"the inputs of a region with partition= are on {' and '.join(devices)}",
            why="their chunks travel in one gather",
            fix="move them to one device, or raise min_bytes so that the small ones are kept whole",
        )
    if get(chosen[0].device.type).capabilities.deferred:
        raise BadPartition(
            f"inputs on {devices[0]} cannot be partitioned",
            why="its operators are compiled later, and a gather through the process group would break the graph",
            fix="shard the activations with the mesh of the device instead",
        )
    if chosen[0].device.type not in device_types:
        raise BadPartition(
            f"inputs on {devices[0]} cannot travel through the group of a partition",
            why=f"its backend carries tensors on {', '.join(device_types)}",
            fix="use a group whose backend knows the device, or leave partition= out of this region",
        )


def _site(fn: Any) -> Any:
    """What a call is a call of: a module, or a function's code; the same for every step."""
    while type(fn) is partial:
        fn = fn.func
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, torch.nn.Module):
        return owner
    fn = getattr(fn, "__func__", fn)
    return getattr(fn, "__code__", type(fn))
