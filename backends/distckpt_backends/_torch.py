"""Private or version-dependent names of torch and torch_xla that the backends need; nothing else may use any."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch


def compiled_types() -> tuple[str, ...]:
    """The accelerator types that this build of torch was compiled for, whether or not the machine has one."""
    found = []
    if torch.backends.cuda.is_built():
        found.append("cuda")
    if torch.backends.mps.is_built():
        found.append("mps")
    for kind in ("xpu", "mtia"):  # torch 2.9 to 2.15: a private predicate in both modules
        check = getattr(getattr(torch, kind, None), "_is_compiled", None)
        if check is not None and check():
            found.append(kind)
    return tuple(found)


def private_use_name() -> str:
    """The name that a device extension gave to PrivateUse1; "privateuseone" while none did."""
    return torch._C._get_privateuse1_backend_name()


def device_module(device_type: str) -> ModuleType | None:
    """`torch.<device_type>` if `device_type` is a device type and has a module; imports nothing."""
    try:
        torch.device(device_type)
    except RuntimeError:
        return None
    found = getattr(torch, device_type, None)
    return found if isinstance(found, ModuleType) else None


def is_device_type(name: str) -> bool:
    """True when `torch.device(name)` is valid in this process."""
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def registered_module_types() -> tuple[str, ...]:
    """Device types that someone gave a module through torch's registration function, beside those torch ships.

    That function puts the module into `sys.modules` as `torch.<type>`; only types that torch has no module for are
    asked, so the list is fixed.
    """
    return tuple(k for k in _WITHOUT_MODULE if f"torch.{k}" in sys.modules)


_WITHOUT_MODULE = ("lazy", "hpu", "ipu", "ve", "fpga", "maia", "vulkan", "opengl", "opencl", "ideep")


def in_bad_fork(module: Any) -> bool:
    """True in a forked child of a process that had the device initialised: its runtime cannot be used."""
    check = getattr(module, "_is_in_bad_fork", None)
    return bool(check is not None and check())
