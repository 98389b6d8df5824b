"""Torch's helpers for device random state: ``get_device_states`` and ``set_device_states``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from distckpt_backends import get

from distckpt.engine.inputs import tensors
from distckpt.engine.rng import DefaultDeviceType, choose, current_rule, device_types


def _infer_device_type(*args: Any) -> str:
    """The one device type besides the CPU that the tensors in ``args`` are on, or the default type."""
    chosen = choose(device_types(tensors(args)), current_rule("warn"), "the arguments of a checkpointed call")
    return chosen[0] if chosen else DefaultDeviceType.get_device_type()


def get_device_states(*args: Any) -> tuple[list[int], list[Any]]:
    """Indices of the devices that the tensors in ``args`` are on, and the random state of each, once per device."""
    kind = _infer_device_type(*args)
    indices = list(
        dict.fromkeys(t.get_device() for t in tensors(args) if t.device.type not in ("cpu", "meta"))
    )
    if not indices:
        return [], []
    backend = get(kind)
    return indices, [backend.rng_stash(torch.device(kind, i)) for i in indices]


def set_device_states(
    devices: Sequence[int], states: Sequence[Any], *, device_type: str | None = None
) -> None:
    """Put back what :func:`get_device_states` read; ``device_type`` defaults to ``DefaultDeviceType``'s."""
    kind = DefaultDeviceType.get_device_type() if device_type is None else device_type
    if kind == "meta" or not devices:
        return
    backend = get(kind)
    for index, state in zip(devices, states, strict=False):
        backend.rng_restore(torch.device(kind, index), state)
