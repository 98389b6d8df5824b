"""What a torch device module offers, read from its attributes without initialising anything."""

from __future__ import annotations

from types import ModuleType

import torch

from .protocol import Capabilities


def unavailable_reason(module: ModuleType, device_type: str) -> str | None:
    """Why `module` says that its device type cannot be used; None when it can. Never raises."""
    try:
        if module.is_available():
            return None if module.device_count() > 0 else f"torch.{device_type} reports 0 devices"
    except Exception as error:  # third-party modules raise all sorts; discovery must not
        return f"torch.{device_type}.is_available() raised {type(error).__name__}: {error}"
    return f"torch.{device_type}.is_available() is False on this machine"


def autocast_available(device_type: str) -> bool:
    """True when torch.autocast accepts `device_type`."""
    return torch.amp.is_autocast_available(device_type)


def capabilities_of(
    module: ModuleType, device_type: str, *, cheap: bool, rng: bool = True, why: dict[str, str] | None = None
) -> Capabilities:
    """Capability flags of a device type from the names that its module has.

    `cheap`: whether a fingerprint needs no tensor. `why` gives or replaces reasons by flag.
    """
    name = f"torch.{device_type}"

    def has(*names: str) -> bool:
        return all(hasattr(module, n) for n in names)

    return Capabilities(
        rng=rng,
        cheap_fingerprint=cheap,
        multi_device=has("set_device") or has("device"),
        streams=has("Stream", "Event"),
        pinned_host=has("Stream"),
        current_memory=has("memory_allocated"),
        peak_memory=has("max_memory_allocated", "reset_peak_memory_stats"),
        deferred=False,
        capture=has("is_current_stream_capturing"),
        autocast=autocast_available(device_type),
        reasons={
            "rng": f"{name} has neither default_generators nor get_rng_state and set_rng_state",
            "cheap_fingerprint": f"{name} has no generator offset; the byte state is read and compared",
            "multi_device": f"{name} cannot switch devices",
            "streams": f"{name} lacks Stream or Event",
            "pinned_host": f"{name} has no streams that a copy from pinned memory could run on",
            "current_memory": f"{name} has no memory_allocated",
            "peak_memory": f"{name} has no max_memory_allocated with reset_peak_memory_stats",
            "deferred": "operations run when they are called",
            "capture": f"{name} has no is_current_stream_capturing",
            "autocast": f"torch.autocast does not know {device_type!r}",
            **(why or {}),
        },
    )
