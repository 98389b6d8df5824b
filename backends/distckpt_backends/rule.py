"""The rule for the one device type that a region may use beside the CPU."""

from __future__ import annotations

from collections.abc import Sequence


def select(device_types: Sequence[str]) -> str | None:
    """The device type of a region, from the types of its tensors in call order; None when only the host is
    used.

    `cpu` and `meta` never count. `cuda` wins over the others; without it the first met wins.
    """
    chosen: str | None = None
    for kind in device_types:
        if kind == "cuda":
            return kind
        if chosen is None and kind != "cpu" and kind != "meta":
            chosen = kind
    return chosen


def others(device_types: Sequence[str]) -> tuple[str, ...]:
    """The types, each once and in call order, that count but were not selected: what a mixed region is
    refused for."""
    chosen = select(device_types)
    return tuple(k for k in dict.fromkeys(device_types) if k not in ("cpu", "meta", chosen))
