"""Partition: a region keeps 1/t of its inputs on each of t ranks. (Over 500 lines: settings and gathers are one.)

The idea is that of Megatron-LM's distributed saved activations (Korthikanti et al. 2022, arXiv 2205.05198), for every
tensor input instead of the first, sizes that do not divide, and a gather that is under way before it is needed.

Note [Layout]
    The pieces of a region lie one after another in one run of bytes, each where its storage offset would put it
    modulo 64 bytes: kernels may round differently at another alignment. A tensor without gaps is its memory as it
    is, whatever its strides. One with gaps (a slice) is packed, and gets its gaps back. Dims of stride 0 (expand)
    are kept once. A tensor whose elements overlap otherwise is no piece.

Note [Gather]
    Each rank keeps an equal chunk of the run of bytes. A replay gathers the chunks with one collective. Every chunk
    travels behind a tag, the number of the region and the form of its pieces: ranks that replay different regions
    are told so instead of computing with each other's inputs.

Note [One ahead]
    Backward replays regions in the reverse order of their records. So the replay of a region also starts the gather
    of the one recorded before it, and waits for its own only then. That order is the same on all ranks as long as
    they run the same program. At most one gather is ahead of its replay; one that no replay took by the
    end of the backward is dropped, as the memory of a replay must not outlive it.
    None is started outside a backward, where nobody knows what is replayed next, nor for a chunk behind saved-tensor
    hooks: unpacking that could replay an enclosing region, or fetch it from the host, too early.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from distckpt_backends import get

from distckpt._torch import (
    graph_task_id,
    make_saved_tensor,
    queue_callback,
    top_saved_tensors_hooks,
    without_dispatch_modes,
)
from distckpt._torch_dist import all_gather, group_device_types, plain_part
from distckpt.engine.determinism import checksum
from distckpt.engine.inputs import Packed, own, tensors
from distckpt.errors import BadPartition, GatherMismatch, InputChanged, InputsDiffer

_ALIGN = 64


class Piece:
    """The form of one tensor, and its place in the run: ``start`` and ``nbytes``."""

    __slots__ = (
        "core",
        "dense",
        "dtype",
        "nbytes",
        "requires_grad",
        "shift",
        "size",
        "span",
        "start",
        "stride",
    )

    def __init__(self, t: torch.Tensor, core: list[tuple[int, int]], span: int, start: int) -> None:
        self.size, self.stride, self.dtype = tuple(t.shape), t.stride(), t.dtype
        self.requires_grad = t.requires_grad
        self.core = core
        self.span = span  # elements from the first to the last one in memory
        numel = _numel(core)
        self.dense = numel == span
        self.nbytes = numel * t.element_size()
        self.shift = int(t.storage_offset()) * t.element_size() % _ALIGN
        self.start = start + (self.shift - start) % _ALIGN

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def read(self, t: torch.Tensor) -> torch.Tensor:
        """The bytes of ``t``; a view of its memory where it has no gaps."""
        t = t.detach()
        if self.dense:
            flat = t.as_strided((self.span,), (1,), t.storage_offset())
        else:
            sizes, strides = zip(*self.core, strict=True)
            flat = t.as_strided(sizes, strides, t.storage_offset()).contiguous().view(-1)
        return flat.view(torch.uint8)

    def write(self, run: torch.Tensor) -> torch.Tensor:
        """The tensor again, from the run of all bytes; a view of it where it has no gaps."""
        flat = run[self.start : self.end].view(self.dtype)
        if self.dense:
            t = flat.as_strided(self.size, self.stride, flat.storage_offset())
        else:
            gap = self.shift // self.dtype.itemsize
            memory = torch.zeros((gap + self.span,), dtype=self.dtype, device=run.device)
            sizes, strides = zip(*self.core, strict=True)
            memory.as_strided(sizes, strides, gap).copy_(flat.view(sizes))
            t = memory.as_strided(self.size, self.stride, gap)
        return t.requires_grad_() if self.requires_grad else t

    def form(self) -> tuple[Any, ...]:
        """What must be equal on all ranks."""
        return self.size, self.stride, str(self.dtype), self.start, self.requires_grad


def _numel(core: list[tuple[int, int]]) -> int:
    n = 1
    for size, _ in core:
        n *= size
    return n


def piece(t: torch.Tensor, start: int) -> Piece | None:
    """The piece of ``t`` when it may begin at byte ``start``; None for a tensor that cannot be one."""
    if t.layout is not torch.strided or t.is_quantized or t.is_conj() or t.is_neg() or t.is_inference():
        return None
    if t.numel() == 0 or t.is_meta:
        return None
    core = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and stride]
    core = core or [(1, 1)]
    span = 1
    for size, stride in sorted(core, key=lambda dim: dim[1]):
        if stride < span:
            return None  # elements overlap
        span += (size - 1) * stride
    return Piece(t, core, span, start)


def form_digest(pieces: list[Piece]) -> int:
    """A number that is equal on two ranks when their pieces have the same form."""
    text = repr([p.form() for p in pieces]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)


_TAG = 16  # bytes: the region's number and the digest of its pieces


class AsyncGather:
    """A gather under way."""

    __slots__ = ("_got", "_sent", "_work")

    def __init__(self, chunk: torch.Tensor, tag: tuple[int, int], partition: Partition) -> None:
        with torch.no_grad():
            with without_dispatch_modes():
                # A copy, as the tag goes before it; 1/t of the inputs.
                self._sent = torch.empty(_TAG + len(chunk), dtype=torch.uint8, device=chunk.device)
                for place, value in zip(self._sent[:_TAG].view(torch.int64), tag, strict=True):
                    place.fill_(value)
                self._sent[_TAG:].copy_(chunk)
                self._got = self._sent.new_empty((partition.size, len(self._sent)))
            # In sight of whoever watches collectives.
            self._work: Any = all_gather(self._got.view(-1), self._sent, partition.group, async_op=True)

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tags of all ranks, and the run of bytes."""
        self._work.wait()
        if self._got.is_cuda:  # it may have been started on another stream
            self._got.record_stream(torch.cuda.current_stream(self._got.device))
        with torch.no_grad(), without_dispatch_modes():
            tags = self._got[:, :_TAG].contiguous().view(torch.int64)
            return tags, self._got[:, _TAG:].reshape(-1)


class ShardedInputs:
    """The chunk of one region's record, and the tensors while a replay takes them."""

    def __init__(self, partition: Partition, pieces: list[Piece], tensors: list[torch.Tensor]) -> None:
        self.partition = partition
        self.pieces = pieces
        self.number = partition.recorded
        self.sources = [(weakref.ref(t), t._version) for t in tensors]
        self.behind_hooks = top_saved_tensors_hooks() is not None
        self.size = -(-pieces[-1].end // (partition.size * _TAG)) * _TAG
        self.chunk = make_saved_tensor(self._cut(tensors), False)
        self.before: weakref.ref[ShardedInputs] | None = partition.last_recorded(self)
        self.gather: AsyncGather | None = None
        self.backward = -1  # the graph task of the last gather
        self._parts = 0
        self._taken: set[int] = set()
        self._tensors: list[torch.Tensor] | None = None

    def _cut(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        begin = self.partition.rank * self.size
        with torch.no_grad(), without_dispatch_modes():
            chunk = torch.zeros(self.size, dtype=torch.uint8, device=tensors[0].device)
            for p, t in zip(self.pieces, tensors, strict=True):
                lo, hi = max(p.start, begin), min(p.end, begin + self.size)
                if lo < hi:
                    chunk[lo - begin : hi - begin] = p.read(t)[lo - p.start : hi - p.start]
        return chunk

    def part(self, i: int) -> Packed:
        """What stands for tensor ``i`` in a region's arguments; every part is taken once per replay."""
        self._parts += 1
        return Packed([], partial(self._take, self._parts, i))

    def _take(self, part: int, i: int, _: list[Any]) -> torch.Tensor:
        if self._tensors is None or part in self._taken:  # the second: the last replay failed half-way
            self._taken.clear()
            self._tensors = None
            self._tensors = self._gather()
        self._taken.add(part)
        found = self._tensors[i]
        if len(self._taken) == self._parts:
            self._tensors = None
            self._taken.clear()
        return found

    def _gather(self) -> list[torch.Tensor]:
        for i, (ref, version) in enumerate(self.sources):
            source = ref()
            if source is not None and source._version != version:
                raise InputChanged(
                    f"partitioned input {i} of a region was changed in place between forward and replay",
                    why=f"it is at version {source._version}; the region was recorded with version {version}",
                    fix="pass a clone, or make the change after backward",
                )
        counts = self.partition.counts
        task = graph_task_id()
        gather, self.gather = self.gather, None
        if gather is None:
            gather = self._start()
        else:
            counts.prefetched += 1
        self.backward = task
        if task != -1 and self.partition.prefetch:
            self._look_ahead(task)
        tags, run = gather.wait()
        if task == -1 or _is_host(tags):
            self._compare(tags)
        else:  # reading it would wait for the device
            queue_callback(partial(self._compare, tags))
        with torch.no_grad(), without_dispatch_modes():
            return [p.write(run) for p in self.pieces]

    def _start(self) -> AsyncGather:
        self.partition.counts.gathers += 1
        return AsyncGather(self.chunk.unpack(), self._tag(), self.partition)

    def _tag(self) -> tuple[int, int]:
        return self.number, form_digest(self.pieces)

    def _look_ahead(self, task: int) -> None:
        before = None if self.before is None else self.before()
        if before is None or before.behind_hooks or before.gather is not None or before.backward == task:
            return
        self.partition.gather_ahead(before)
        before.gather = before._start()
        queue_callback(partial(_drop, weakref.ref(before)))

    def drop(self) -> None:
        """Drop a gather that no replay took."""
        if self.gather is not None:
            self.gather.wait()
            self.gather = None
            self.partition.counts.dropped += 1

    def _compare(self, tags: torch.Tensor) -> None:
        wanted = self._tag()
        found = [tuple(tag) for tag in tags.tolist()]
        apart = [i for i, tag in enumerate(found) if tag != wanted]
        if apart:
            ranks = self.partition.ranks
            raise GatherMismatch(
                f"rank {ranks[apart[0]]} gathered the inputs of region {found[apart[0]][0]} of the partition, while "
                f"rank {ranks[self.partition.rank]} replays region {wanted[0]}",
                why="the ranks of a group record and replay the same regions in the same order, or get each other's "
                "inputs",
                fix="run the same backward on all ranks of the group; leave partition= out where they branch",
            )


def _is_host(tags: torch.Tensor) -> bool:
    return tags.device.type == "cpu"


def _drop(ref: weakref.ref[ShardedInputs]) -> None:
    sharded = ref()
    if sharded is not None:
        sharded.drop()


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
    one per group and keep it. Kept whole are parameters, tensors below ``min_bytes``, DTensors that are not
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
