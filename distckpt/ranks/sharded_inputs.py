"""Sharded inputs: what one rank keeps of a region's partitioned inputs, and how they come back, to the bit and stride.

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

import hashlib
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from distckpt._torch import (
    graph_task_id,
    make_saved_tensor,
    queue_callback,
    top_saved_tensors_hooks,
    without_dispatch_modes,
)
from distckpt._torch_dist import all_gather
from distckpt.engine.inputs import Packed
from distckpt.errors import GatherMismatch, InputChanged

if TYPE_CHECKING:
    from distckpt.ranks.partition import Partition


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
