"""Value checks of a replay: a checksum (``"fingerprint"``) or an exact copy (``"bitwise"``) per saved tensor.

Note [When a saved value is final]
    Autograd hands some tensors to the hook before the operator has filled them (RReLU's noise), so a tensor is only
    read a few saves later, or when the region ends. Nobody may change it in between: plain autograd
    would refuse that too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from distckpt._torch import without_dispatch_modes
from distckpt.engine.doubt import Doubtful

_DELAY = 8  # no operator saves more tensors than this before its kernel runs
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` as a flat integer tensor, so that NaN equals NaN and 0.0 differs from -0.0."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().contiguous().view(-1).view(_WIDTHS[x.element_size()])


def checksum(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit checksum of the values of ``x``, on its device and without synchronising.

    A sum of the bit patterns, each times an odd number that depends on its place, modulo 2**64: any single
    changed element changes it, and so does a permutation, with overwhelming likelihood.
    """
    bits = _bits(x).to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64).mul_(-7046029254386353131)
    return (bits * weights.bitwise_or_(1)).sum()


class Verifier:
    """What a region saved, in a form that a replay can be compared with."""

    def __init__(self, level: str | Callable[[torch.Tensor], Any]) -> None:
        self.level = level  # or a function of the user's, whose results are compared
        self._waiting: deque[torch.Tensor] = deque()
        self._prints: list[Any] = []
        self._ids: list[int] = []

    def saw(self, x: torch.Tensor) -> None:
        """A tensor was saved in the forward."""
        self._ids.append(id(x))
        self._waiting.append(x.detach())
        if len(self._waiting) > _DELAY:
            self._prints.append(self._print(self._waiting.popleft()))

    def seal(self, buffers: Any = None) -> None:
        """The forward has ended, or stands still: what was saved is final.

        Buffers that the forward changed are left out: they have no one value that was saved.
        """
        while self._waiting:
            self._prints.append(self._print(self._waiting.popleft()))
        if buffers is not None:
            ids = {id(e.tensor) for e in buffers.entries}
            self._prints = [None if i in ids else p for i, p in zip(self._ids, self._prints, strict=True)]

    def _print(self, x: torch.Tensor) -> Any:
        if x.layout is not torch.strided or x.is_meta or (x.dtype is torch.uint8 and x.dim() == 1):
            return None  # the last kind is the workspace of a fused kernel, and partly uninitialised
        with torch.no_grad(), without_dispatch_modes():
            if callable(self.level):
                return self.level(x)
            return checksum(x) if self.level == "fingerprint" else _bits(x).clone()

    def compare(self, refs: list[Any], buffers: Any, mismatch: Any) -> None:
        """Compare the values that a replay put into the living slots; one synchronisation for all of them."""
        self.seal(buffers)
        differs: dict[int, Any] = {}
        with torch.no_grad(), without_dispatch_modes():
            for i, ref in enumerate(refs):
                slot = ref()
                value = None if slot is None else slot.value
                if value is not None and type(value) is not Doubtful and self._prints[i] is not None:
                    differs[i] = self._print(value) != self._prints[i]
            wrong = [
                i for i, flag in differs.items() if (flag.any() if isinstance(flag, torch.Tensor) else flag)
            ]
        if wrong:
            mismatch.values(wrong)
