"""Random states that are byte tensors: comparing them, and refusing foreign ones."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from .errors import RngStateError

# Comparing through the C library costs two data_ptr() calls and one memcmp: no numpy, no aten op that a
# dispatch mode would see. PyDLL keeps the GIL, which is cheaper than letting it go for a quarter of a
# microsecond.
memcmp = (ctypes.PyDLL(None) if sys.platform != "win32" else ctypes.cdll.msvcrt).memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
memcmp.restype = ctypes.c_int


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when two contiguous uint8 CPU tensors have equal size and content."""
    size = a.numel()
    return size == b.numel() and memcmp(a.data_ptr(), b.data_ptr(), size) == 0


def read_bytes(state: torch.Tensor) -> bytes:
    """The content of a uint8 tensor, copied without an aten op when it is on the host."""
    host = state if state.device.type == "cpu" else state.cpu()
    return ctypes.string_at(host.data_ptr(), host.numel())


def write_bytes(state: bytes) -> torch.Tensor:
    """A uint8 CPU tensor with this content; the opposite of read_bytes()."""
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def is_bytes(state: Any, size: int) -> bool:
    """True when `state` is a plain, contiguous uint8 CPU tensor of `size` elements."""
    return (
        isinstance(state, torch.Tensor)
        and state.numel() == size
        and state.dtype is torch.uint8
        and state.device.type == "cpu"
        and state.is_contiguous()
    )


def foreign(device_type: str, expected: str, state: Any) -> RngStateError:
    """The error for a state that `device_type` did not make."""
    if isinstance(state, torch.Tensor):
        found = f"a {state.dtype} tensor of {state.numel()} elements on {state.device}"
    elif isinstance(state, bytes):
        found = f"{len(state)} bytes"
    elif isinstance(state, (int, tuple)):
        found = f"{state!r}"
    else:
        found = f"an object of type {type(state).__name__}"
    return RngStateError(
        f"this is not a random state of {device_type!r}; the generator was left as it was",
        why=f"expected {expected}, got {found}",
        fix="give back the object that rng_stash() of the same backend returned",
    )
