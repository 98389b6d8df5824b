"""Pieces: tensors as runs of bytes, and back, to the bit and to the stride.

Note [Layout]
    The pieces of a region lie one after another in one run of bytes, each where its storage offset would put it
    modulo 64 bytes: kernels may round differently at another alignment. A tensor without gaps is its memory as it
    is, whatever its strides. One with gaps (a slice) is packed, and gets its gaps back. Dims of stride 0 (expand)
    are kept once. A tensor whose elements overlap otherwise is no piece.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

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


def digest(pieces: list[Piece]) -> int:
    """A number that is equal on two ranks when their pieces have the same form."""
    text = repr([p.form() for p in pieces]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)
