"""Pinned values: decided once in the forward, replayed and never recomputed.

A router's choice, a sampled index or a sort order that is recomputed may flip on a tie, and then every shape after it
differs. A pinned value is kept by every region around it and handed back in the same order in a replay.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from distckpt._torch import open_node
from distckpt.engine.state import Frame, here, refuse
from distckpt.errors import PinMismatch

T = TypeVar("T")


class _Kept:
    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = _version(tensor)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # an inference tensor counts no changes


class _Replace(torch.autograd.Function):
    """Gives ``kept`` in the forward and sends the gradient to ``computed``."""

    @staticmethod
    def forward(ctx: Any, computed: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return kept.detach()  # the one way to a new tensor that selective regions do not count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def pin(value: T) -> T:
    """Return ``value``; inside a region, the value of the first forward in every replay.

    Args:
        value: any pytree of tensors and plain values. Tensors that require grad keep their gradient path.

    Returns:
        An equal pytree. Outside a region ``value`` itself.

    Raises:
        PinMismatch: the replay pins more values than the forward did, or other shapes, or a pinned tensor was
            changed in place.
    """
    frame = here.frame
    if frame is None:
        return value
    recording = []
    while frame is not None and type(frame) is not Frame:
        recording.append(frame)
        frame = frame.outer
    if frame is not None:
        value = _recall(frame, value)
    if recording:
        kept = _keep(value)
        for region in recording:  # an outer region must also replay it, when it records the inner one again
            if region.pins is None:
                region.pins = []
            region.pins.append(kept)
    return value


def _recall(frame: Frame, computed: Any) -> Any:
    region = frame.region
    pins = region.pins or ()
    index = frame.pins
    if index >= len(pins):
        if not region.closed:
            return computed
        refuse(
            region,
            PinMismatch(
                f"the replay pins value number {index + 1}, but the forward pinned {len(pins)}",
                why="the replay took another path than the forward",
                fix="pin the value that decides the path, before it is used",
            ),
        )
    frame.pins = index + 1
    try:
        return _restore(pins[index], computed)
    except PinMismatch as error:
        refuse(region, error)


# Not torch's pytree: its closures are cycles, which hold their leaves until the collector runs.


def _keep(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Kept(value)
    opened = open_node(value)
    if opened is None:
        return value
    parts, rebuild = opened
    return rebuild([_keep(part) for part in parts])


def _restore(kept: Any, computed: Any) -> Any:
    if type(kept) is _Kept:
        return _restore_tensor(kept, computed)
    opened = open_node(kept)
    if opened is None:
        return kept
    parts, rebuild = opened
    beside = open_node(computed)
    if type(kept) is not type(computed) or beside is None or len(beside[0]) != len(parts):
        raise PinMismatch(
            f"the replay pins a {type(computed).__name__} where the forward pinned a {type(kept).__name__}, "
            "or one of another length",
            why="the replay took another path than the forward",
            fix="pin the value that decides the path, before it is used",
        )
    return rebuild([_restore(a, b) for a, b in zip(parts, beside[0], strict=True)])


def _restore_tensor(kept: _Kept, computed: Any) -> torch.Tensor:
    tensor = kept.tensor
    if _version(tensor) != kept.version:
        raise PinMismatch(
            f"a pinned {tensor.dtype} tensor of shape {tuple(tensor.shape)} was changed in place after dc.pin()",
            fix="clone the pinned value before changing it",
        )
    if isinstance(computed, torch.Tensor) and computed.requires_grad and computed.shape == tensor.shape:
        return _Replace.apply(computed, tensor)
    return tensor.detach()
